"""GPU benchmarks, run on CPU: a contender that is wrong or missing is never timed; peaks of memory."""

import dataclasses
import importlib.util
import json
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import gpu, gpu_memory_peak, markdown, planning
from experiments.benchmarks.hopper.jobs import Job, Outcome
from experiments.benchmarks.hopper.report import measured as measured_lines
from experiments.benchmarks.markdown import read
from experiments.studies import memory_estimators as study


@dataclasses.dataclass(frozen=True)
class Shape:
    n: int

    def arrays(self):
        rng = np.random.default_rng(0)
        return [rng.standard_normal(self.n, np.float32).astype(jnp.bfloat16) for _ in range(3)]


def product(x, y):
    return x * y


def contender(f, shape):
    return gpu.jax_runner(f, shape.arrays())


def missing(shape):
    raise ImportError("no such package")


def test_only_what_agrees_is_timed(monkeypatch):
    monkeypatch.setattr(gpu, "copy_rate", lambda: 1e9)
    measured = gpu.measure(
        [Shape(1000)],
        {
            "right": partial(contender, product),
            "wrong value": partial(contender, lambda x, y: x * y + 0.1),
            "wrong gradient": partial(contender, lambda x, y: x * jnp.round(y * 2**9) / 2**9),
            "missing": missing,
            "too slow": missing,
        },
        lambda shape: product,
        stand_in=lambda shape: Shape(64),
        bound=2**-6,
        least_bytes=lambda shape, passes: {"forward": 6, "both": 12}[passes] * shape.n,
        effort=gpu.Effort(repeats=2, without=("slow",)),
    )
    rows = list(measured)
    assert [(row["n"], row["passes"]) for row in rows] == [(1000, "forward"), (1000, "both")]
    for row in rows:
        assert set(row["median_ms"]) == set(row["share_of_copy"]) == {"right"}
        assert row["left_out"] == ["too slow"]
        assert "too slow" not in row["errors"]
        assert row["errors"]["missing"] == "ImportError: no such package"
        assert (
            row["errors"]["right"]
            < 2**-6
            < min(row["errors"]["wrong value"], row["errors"]["wrong gradient"])
        )


def test_one_of_each_kind_is_the_first():
    odd_and_even = gpu.one_each([Shape(5), Shape(6), Shape(8), Shape(7)], lambda shape: shape.n % 2)
    assert odd_and_even == [Shape(5), Shape(6)]


def test_a_plan_of_memory_is_the_compilers_and_the_estimators(monkeypatch):
    """A row says where no bytes are counted; else its ratios are of the peak less what was there before."""
    step = gpu_memory_peak.TINY[1]
    row = gpu_memory_peak.run(step)
    assert row["unmeasured"] == "cpu does not count bytes"
    params = 2 * (32 * 32 + 32)
    assert row["params"] == params
    assert row["compiled_bytes"] == study.asked_for(step.config())
    assert row["formulas_bytes"] == 4 * (4 * params + 32 * 2 * 64)  # Adam's two moments; inputs, and outputs
    assert row["liveness_bytes"] == study.by_liveness(step.config())

    counts = [
        {"bytes_limit": 10**6, "bytes_in_use": 100, "peak_bytes_in_use": 500},
        {"bytes_limit": 10**6, "bytes_in_use": 100, "peak_bytes_in_use": 100 + 2 * row["compiled_bytes"]},
    ]

    def run(counts):
        device = types.SimpleNamespace(memory_stats=iter(counts).__next__, device_kind="chip")
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda: [device])
            return gpu_memory_peak.run(step)

    measured = run(counts)
    assert measured["peak_bytes"] == 2 * row["compiled_bytes"]
    assert measured["compiled_over_peak"] == 0.5
    assert measured["formulas_over_peak"] == pytest.approx(row["formulas_over_compiled"] / 2, abs=1e-3)
    assert run([counts[0], counts[0]])["unmeasured"] == "compiling took more: 500 bytes"
    small = counts[0] | {"bytes_limit": 1100}
    assert run([small])["unmeasured"] == "the allocator has 1,000 bytes"


def test_the_table_of_peaks_reads_what_was_measured(tmp_path, monkeypatch):
    one = {"family": "MLP", "params": 2_000_000, "batch": [64, 32], "compiled_bytes": 3_000_000_000}
    one |= {"formulas_over_compiled": 1.5, "liveness_over_compiled": 0.9}
    rows = [one | {"peak_bytes": 4_000_000_000, "compiled_over_peak": 0.75}, one | {"unmeasured": "no room"}]
    about = {"chip": "H200", "date": "today", "versions": {"jax": "1"}}
    (tmp_path / "gpu_memory_peak_measured.json").write_text(json.dumps(about | {"rows": rows}))
    for module in (markdown, planning):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    lines = planning.memory_peaks().splitlines()
    assert lines[0] == "H200, jax 1, today."
    assert lines[-2:] == [
        "| MLP | 2 M | 64 x 32 | 3.0 | 1.50 | 0.90 | 4.0 | 0.750 |",
        "| MLP | 2 M | 64 x 32 | 3.0 | 1.50 | 0.90 | no room |  |",
    ]
    assert measured_lines([Outcome(Job("peaks", (), 1.0, "gpu_x_measured.json"), result={"rows": rows})])[
        1
    ] == (
        "    family=MLP params=2000000 batch=[64, 32] compiled_bytes=3000000000 peak_bytes=4000000000; "
        "formulas_over_compiled 1.5; liveness_over_compiled 0.9; compiled_over_peak 0.75"
    )


@pytest.mark.full
def test_each_step_has_a_process_of_its_own():
    found = list(gpu_memory_peak.measure(gpu_memory_peak.TINY[1:], gpu.Effort(1)))
    assert [row["family"] for row in found] == ["MLP", "CNN"]


@pytest.mark.full
@pytest.mark.deviceless
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin")
def test_steps_are_planned_for_a_gpu_that_is_not_here():
    committed = read("gpu_memory_peak_deviceless")["rows"]
    assert [tuple(row["numbers"]) for row in committed] == [step.numbers for step in gpu_memory_peak.SHAPES]
    (row,) = gpu_memory_peak.deviceless(gpu_memory_peak.SHAPES[:1])
    for name in ("compiled_bytes", "formulas_bytes", "liveness_bytes"):
        assert row[name] == committed[0][name]
