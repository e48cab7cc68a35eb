"""The list of jobs, most important first: a row of `cases.CASES` and one of `BENCHMARKS` an operation."""

import ast
import re
import sys
from pathlib import Path

from .jobs import Job

HERE = Path(__file__).parent
# (what is measured, its module beside this folder, the shapes that come first: text that they have in them)
BENCHMARKS = (
    ("linear_attention", "gpu_linear_attention", "H=96"),
    ("ssd", "gpu_linear_attention", "SSD(B=8"),
    ("selective_scan", "gpu_selective_scan", "B=8, T=2048, D=5120"),
    ("rnn", "gpu_rnn", "B=16, T=1024, H=8"),
    ("quantized_matmul", "gpu_quantized_matmul", "M=16, K=4096, N=4096, group_size=128"),
    ("grouped_matmul", "gpu_grouped_matmul", "E=128, load='zipf'"),
    ("adam_8bit", "gpu_adam_8bit", "group_size=256"),
    ("memory_peak", "gpu_memory_peak", "Transformer', numbers=(6,"),
)
CONFORMANCE_SECONDS = 75  # of which a kernel's compilation may take most
REHEARSAL_SECONDS = 300  # for any job: CPUs are shared with who knows whom
FIRST_SECONDS, REST_SECONDS = 90, 240  # of a benchmark's first shapes in JAX, and of any other
TORCH = ("flash", "mamba", "cuDNN")  # peers that compile for minutes, or may


def conformance(rehearse: bool) -> list[Job]:
    """Return a job for each row of `cases.CASES`, which is read without importing jax."""
    mode = ("--rehearse",) if rehearse else ()
    return [
        Job(
            f"conformance: {name}",
            (*module("hopper.conformance"), name, "--output", "{output}", *mode),
            REHEARSAL_SECONDS if rehearse else CONFORMANCE_SECONDS,
            f"conformance_{re.sub(r'[^a-z0-9]+', '_', name)}.json",
        )
        for name in case_names()
    ]


def benchmarks(rehearse: bool) -> list[Job]:
    """Return the jobs that measure: first shapes among JAX's contenders, then among all, then the rest."""
    if rehearse:
        modules = dict.fromkeys(name for _, name, _ in BENCHMARKS)
        return [_benchmark(f"benchmark: {name}", name, REHEARSAL_SECONDS, "--rehearse") for name in modules]
    modules = dict.fromkeys(name for _, name, _ in BENCHMARKS)
    jobs = []
    for who, seconds, options in (
        ("in JAX", FIRST_SECONDS, ("--without", *TORCH)),
        ("all contenders", REST_SECONDS, ()),
    ):
        for what, name, only in BENCHMARKS:
            title = f"benchmark: {what}, first shapes, {who}"
            jobs.append(_benchmark(title, name, seconds, "--go-on", "--only", only, *options))
    rest = [_benchmark(f"benchmark: {name}, the rest", name, REST_SECONDS, "--go-on") for name in modules]
    return jobs + rest


def machine(rehearse: bool) -> Job:
    """Return the job that looks whether the others can run."""
    mode = ("--rehearse",) if rehearse else ()
    return Job("machine", (*module("hopper.machine"), "--output", "{output}", *mode), 90, "machine.json")


def module(name: str) -> tuple[str, ...]:
    """Return the command of a module of `experiments.benchmarks`."""
    return (sys.executable, "-m", f"experiments.benchmarks.{name}")


def _benchmark(what: str, name: str, seconds: float, *options: str) -> Job:
    return Job(what, (*module(name), "--output", "{output}", *options), seconds, f"{name}_measured.json")


def case_names() -> list[str]:
    """Return the keys of `CASES`, from the text of the file: to import it takes jax."""
    for node in ast.parse((HERE / "cases.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "CASES":
            assert isinstance(node.value, ast.Dict)
            return [key.value for key in node.value.keys if isinstance(key, ast.Constant)]  # type: ignore[misc]
    raise LookupError("cases.py: no CASES; expected one dictionary of that name")
