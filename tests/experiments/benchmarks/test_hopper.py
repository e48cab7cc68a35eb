"""The command for a Hopper: its runner on jobs that crash, hang or are late, and its rehearsal."""

import ast
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import gpu
from experiments.benchmarks.hopper import __main__ as hopper
from experiments.benchmarks.hopper import conformance, jobs, plan, report
from experiments.benchmarks.hopper.cases import CASES, Case
from experiments.benchmarks.hopper.jobs import Job

ROOT = Path(__file__).parents[3]


def job(name, program, *arguments, seconds=60.0, output=""):
    return Job(name, (sys.executable, "-S", "-c", program, *map(str, arguments)), seconds, output)


PASSES = job("passes", "print('fine')")
RAISES = job("raises", "print('so far')\nraise ValueError('wrong by 3')")
ABORTS = job("aborts", "import os\nos.abort()")
# It writes a row, starts a process that holds a lock, and hangs.
HANGS = """
import json, subprocess, sys, time
json.dump([{"case": "first", "right": True}], open(sys.argv[1], "w"))
lock = open(sys.argv[2], "w")
import fcntl
fcntl.flock(lock, fcntl.LOCK_EX)
subprocess.Popen(["sleep", "1000"], pass_fds=[lock.fileno()])
time.sleep(1000)
"""


def run_all(tmp_path, *some, seconds=60.0, changed=lambda outcome: None, at_once=1):
    until = time.monotonic() + seconds
    return jobs.run_all(
        some, folder=tmp_path, until=until, environment=os.environ, changed=changed, at_once=at_once
    )


def test_a_crash_and_an_exception_cost_their_job(tmp_path):
    outcomes = run_all(tmp_path, RAISES, ABORTS, PASSES, at_once=2)
    assert [o.status for o in outcomes] == ["failed", "crashed", "passed"]
    assert outcomes[0].error.splitlines() == ["ended with 1", "ValueError: wrong by 3"]
    assert outcomes[1].error.splitlines()[0] == "ended by SIGABRT"
    assert "fine" in outcomes[2].log


def test_a_hang_is_ended_with_the_processes_that_it_started(tmp_path):
    hangs = job("hangs", HANGS, "{output}", tmp_path / "lock", seconds=2.0, output="hangs.json")
    (outcome, after) = run_all(tmp_path, hangs, PASSES)
    assert (outcome.status, after.status) == ("timed out", "passed")
    assert outcome.result == [{"case": "first", "right": True}]  # written before it hung
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # comes back once nothing that it started lives


def test_no_job_starts_or_lasts_beyond_the_minutes(tmp_path, monkeypatch):
    assert [o.status for o in run_all(tmp_path, PASSES, PASSES, seconds=jobs.LEAST - 1)] == ["left out"] * 2
    monkeypatch.setattr(jobs, "LEAST", 1.0)
    late = [job("late", "import time\ntime.sleep(1000)"), PASSES]
    assert [o.status for o in run_all(tmp_path, *late, seconds=2.0)] == ["out of time", "left out"]


def test_a_result_is_on_disk_before_its_job_ends(tmp_path):
    """The job ends only once the record has its first row."""
    program = """
import json, os, sys, time
json.dump([{"row": 1}], open(sys.argv[1], "w"))
while not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
json.dump([{"row": 1}, {"row": 2}], open(sys.argv[1], "w"))
"""
    record = report.Record(tmp_path / "out", "test")

    def changed(outcome):
        record.changed(outcome)
        on_disk = json.loads((tmp_path / "out" / "hopper.json").read_text())
        if on_disk["results"].get("rows.json") == [{"row": 1}]:
            assert on_disk["jobs"][0]["status"] == "running"
            (tmp_path / "seen").touch()

    writes = job("writes", program, "{output}", tmp_path / "seen", output="rows.json")
    run_all(tmp_path, writes, changed=changed)
    assert record.as_json()["results"] == {"rows.json": [{"row": 1}, {"row": 2}]}
    assert sorted(os.listdir(tmp_path / "out")) == ["hopper.json", "summary.txt"]


def run(tmp_path, *some, seconds=60.0, first=PASSES, whole=False):
    return hopper.run(
        first,
        [(some, 1)],
        out=tmp_path,
        title="test",
        until=time.monotonic() + seconds,
        variables=os.environ,
        whole=whole,
    )


def test_the_exit_code_and_the_summary_say_what_failed(tmp_path):
    assert run(tmp_path, PASSES) == 0
    assert run(tmp_path, RAISES, PASSES) == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert "FAILED: raises" in summary
    assert "ValueError: wrong by 3" in summary
    assert run(tmp_path, PASSES, first=RAISES) == 1
    assert len(json.loads((tmp_path / "hopper.json").read_text())["jobs"]) == 1  # nothing but the first


def test_the_summary_has_times_and_ratios_of_each_row():
    row = {"format": "int4", "M": 1, "median_ms": {"pallas_gpu": 0.01}, "errors": {}, "times_bfloat16": 3.21}
    done = jobs.Outcome(job("quick", "", output="gpu_x_measured.json"), result={"rows": [row]})
    assert "    format=int4 M=1: pallas_gpu 0.01 ms; times_bfloat16 3.21" in report.measured([done])


@pytest.mark.parametrize(
    ("name", "whole", "code"),
    [
        ("benchmark", False, 0),
        pytest.param("benchmark", True, 1, marks=pytest.mark.full),  # a rehearsal leaves out nothing
        pytest.param("conformance", False, 1, marks=pytest.mark.full),
    ],
)
def test_what_the_minutes_left_out_is_named(tmp_path, monkeypatch, name, whole, code):
    """A benchmark may be left out; a kernel that was never tried is not known to be right."""
    monkeypatch.setattr(jobs, "LEAST", 1.0)
    waits = job("waits", "import time\ntime.sleep(2)", seconds=10)
    output = "gpu_x_measured.json" if name == "benchmark" else ""
    left = dataclasses.replace(PASSES, name=name, output=output)
    assert run(tmp_path, left, first=waits, seconds=2.9, whole=whole) == code
    assert f"{name} (left out)" in (tmp_path / "summary.txt").read_text()


@pytest.mark.nan
def test_a_wrong_kernel_a_wrong_gradient_and_a_nan_are_caught():
    def case(kernel):
        def call(x, backend):
            return kernel(x) if backend == "pallas_gpu" else x * x

        return Case("square", call, {"x": np.linspace(0.5, 2, 64, dtype=np.float32)})

    assert conformance.check(case(lambda x: x * x))["right"]
    assert not conformance.check(case(lambda x: x * x + 1e-4))["right"]
    assert not conformance.check(case(lambda x: x * jnp.nan))["right"]
    gradient = conformance.check(case(lambda x: x * jnp.round(x * 2.0**20) / 2.0**20))
    assert gradient["errors"]["output 0"] < gradient["bound"] < gradient["errors"]["d x"]
    assert not gradient["right"]


def test_every_kernel_for_hopper_has_its_row():
    kernels = {path.parent.name for path in (ROOT / "lib" / "kernels").glob("*/pallas_gpu*")}
    assert kernels
    assert plan.case_names() == list(CASES)
    for kernel in kernels:
        assert any(name.startswith(kernel) for name in CASES), f"cases.py: {kernel} has no row in CASES"


def test_jobs_have_names_and_conformance_outputs_of_their_own():
    planned = [*plan.conformance(False), *plan.benchmarks(False)]
    assert len({job.name for job in planned}) == len(planned)
    assert len({job.output for job in plan.conformance(False)}) == len(CASES)


@pytest.mark.parametrize(("what", "module", "first"), plan.BENCHMARKS, ids=str)
def test_a_benchmarks_first_shapes_exist(what, module, first):
    """The text is that of a shape: where it is of none, the job would measure nothing."""
    benchmark = __import__(f"experiments.benchmarks.{module}", fromlist=["SHAPES"])
    lists = ("SHAPES", "SSD_SHAPES", "TAYLOR_SHAPES")
    shapes = [shape for name in lists for shape in getattr(benchmark, name, [])]
    assert any(first in str(shape) for shape in shapes)
    assert len({str(type(shape)) for shape in shapes}) == len({str(type(shape)) for shape in benchmark.TINY})


@dataclasses.dataclass(frozen=True)
class Shape:
    n: int


def test_a_benchmark_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Rows of this chip and these versions are kept, a shape that has but its first row is measured anew."""

    def measure(shapes, effort):
        assert effort.repeats == 1
        for shape in shapes:
            for passes in ("forward", "both"):
                left_out = {"left_out": ["x"]} if effort.without else {}
                times = {"median_ms": {"pallas_gpu": 1.0} if shape.n < 4 else {"xla": 1.0}}
                yield dataclasses.asdict(shape) | {"passes": passes, "by": len(shapes)} | left_out | times
                if shape.n == 2 and len(shapes) == 3:
                    raise MemoryError

    def main(*options, shapes=(1, 2, 3)):
        monkeypatch.setattr(sys, "argv", ["x", "--rehearse", "--output", str(tmp_path / "x.json"), *options])
        gpu.main("", "x", [], measure, list, [Shape(n) for n in shapes])

    def rows():
        return [
            (row["n"], row["passes"], row["by"])
            for row in json.loads((tmp_path / "x.json").read_text())["rows"]
        ]

    with pytest.raises(MemoryError):
        main()
    assert rows() == [(1, "forward", 3), (1, "both", 3), (2, "forward", 3)]
    main("--go-on")
    assert rows()[:2] == [(1, "forward", 3), (1, "both", 3)]
    assert rows()[2:] == [(n, passes, 2) for n in (2, 3) for passes in ("forward", "both")]
    main("--go-on", "--without", "x")
    assert len(rows()) == 6  # nothing to do: those with more contenders are kept
    monkeypatch.setattr(gpu, "versions", lambda: {"jax": "another"})
    with pytest.raises(MemoryError):
        main("--go-on")
    assert len(rows()) == 3  # of another version: measured anew
    main("--go-on", "--without", "x")
    main("--go-on", "--without", "x")
    assert rows()[2:] == [(n, passes, 2) for n in (2, 3) for passes in ("forward", "both")]
    main("--go-on")
    assert rows()[2:] == [(n, passes, 2) for n in (2, 3) for passes in ("forward", "both")]
    written = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert not any("left_out" in row for row in written)  # measured anew with all contenders
    with pytest.raises(SystemExit, match="our kernel"):
        main(shapes=[4])


def test_a_run_goes_on_with_an_earlier_ones_benchmarks(tmp_path):
    program = "import json, sys; x = json.load(open(sys.argv[1])); json.dump(x + [2], open(sys.argv[1], 'w'))"
    adds = job("benchmark", program, "{output}", output="gpu_x_measured.json")
    before = {"results": {"gpu_x_measured.json": [1], "conformance_x.json": [9]}}
    variables, until = os.environ, time.monotonic() + 60
    options = dict(out=tmp_path, title="test", until=until, variables=variables, before=before)
    assert hopper.run(PASSES, [([adds], 1)], **options) == 0
    assert json.loads((tmp_path / "hopper.json").read_text())["results"] == {"gpu_x_measured.json": [1, 2]}


def test_a_peer_without_its_compiled_half_is_imported_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "half_built" / "ops").mkdir(parents=True)
    (tmp_path / "half_built" / "__init__.py").write_text("import no_such_extension\n")
    (tmp_path / "half_built" / "ops" / "pure.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert gpu.without_init("half_built.ops.pure").answer == 42
    with pytest.raises(ImportError):
        gpu.without_init("not_there_at_all.ops")


def test_wheels_and_sources_are_importable_without_a_network(tmp_path):
    wheels, scratch = tmp_path / "wheels", tmp_path / "scratch"
    for folder in (wheels, scratch, tmp_path / "sources-1.0" / "from_sources"):
        folder.mkdir(parents=True)
    with zipfile.ZipFile(wheels / "from_wheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("from_wheel.py", "name = 'wheel'\n")
        about = "from_wheel-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: from_wheel\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    (tmp_path / "sources-1.0" / "from_sources" / "__init__.py").write_text("name = 'sources'\n")
    subprocess.run(["tar", "-czf", wheels / "sources-1.0.tar.gz", "-C", tmp_path, "sources-1.0"], check=True)
    paths = hopper.import_paths(scratch, wheels)
    program = "import from_wheel, from_sources; print(from_wheel.name, from_sources.name)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["wheel", "sources"], done.stderr


@pytest.mark.full
def test_a_rehearsal_where_the_package_is_not_installed(tmp_path):
    """An environment as a GPU machine has it: the packages, and no `frugax` but the checkout's `lib`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": sysconfig.get_path("purelib")}
    missing = subprocess.run(
        [python, "-c", "import frugax"], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert "ModuleNotFoundError: No module named 'frugax'" in missing.stderr
    command = [python, "-m", "experiments.benchmarks.hopper", "--rehearse", "--out", tmp_path / "out"]
    done = subprocess.run(
        [*command, "--only", "linear_recurrence, float32"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "hopper.json").read_text())
    assert [row["status"] for row in record["jobs"]] == ["passed", "passed"]
    assert record["machine"]["chip"] == "cpu"
    ((case,),) = [rows for name, rows in record["results"].items() if name.startswith("conformance")]
    assert case["right"]
    assert {"output 0", "output 1", "d a", "d b", "d initial_state"} == set(case["errors"])


def test_what_needs_no_gpu_machines_packages():
    """The jobs import jax, numpy, frugax, each other and Python's own at their heads, nothing else."""
    folder = ROOT / "experiments" / "benchmarks"
    for path in [*folder.glob("gpu*.py"), folder / "interleaved.py", *(folder / "hopper").glob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                root = name.partition(".")[0]
                known = root in sys.stdlib_module_names | {"jax", "numpy", "frugax", "experiments"}
                assert known, f"{path.name} imports {name}"
