"""Everything that a Hopper GPU is needed for: conformance of every kernel, then benchmarks against peers.

    python -m experiments.benchmarks.hopper --minutes 9 --out DIR     # on the chip
    python -m experiments.benchmarks.hopper --rehearse                # the same list on a CPU, tiny

Each is a process of its own, most important first. DIR gets `hopper.json`, with all results, whole at every
moment, and `summary.txt`. `--keep DIR/hopper.json` writes the benchmarks' results where the project has them.
It fails if a job failed or a kernel's conformance was not reached; a rehearsal, if anything was not. More in
docs/how-to/hopper.md.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plan
from .jobs import PASSED, Job, read_json, run_all
from .report import Record, keep

ROOT = Path(__file__).resolve().parents[3]  # the checkout
RESULTS = ROOT / "experiments" / "benchmarks" / "results"


def import_paths(scratch: Path, wheels: Path | None) -> list[str]:
    """Return folders from which `frugax`, `experiments` and the wheels can be imported.

    `frugax` is this checkout's `lib`, whether or not any is installed. An archive of sources among the wheels
    is unpacked and not built.
    """
    (scratch / "checkout").mkdir()
    (scratch / "checkout" / "frugax").symlink_to(ROOT / "lib", target_is_directory=True)
    paths = [str(scratch / "checkout"), str(ROOT)]
    if wheels is not None:
        if not (files := sorted(wheels.glob("*.whl"))):
            sys.exit(f"--wheels: got {wheels}, which has no *.whl; expected a folder of wheels")
        target = scratch / "wheels"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        done = subprocess.run(
            [*pip, "--target", str(target), *map(str, files)], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"--wheels: pip could not install them:\n{done.stderr[-2000:]}")
        paths.append(str(target))
    for archive in sorted(wheels.glob("*.tar.gz")) if wheels else []:
        with tarfile.open(archive) as sources:
            sources.extractall(scratch / "sources", filter="data")
    if (scratch / "sources").is_dir():
        paths += map(str, (scratch / "sources").iterdir())
    return paths


def environment(paths: Sequence[str], rehearse: bool) -> dict[str, str]:
    """Return the variables of a job's process."""
    mine = {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the chip, and torch has its part
    }
    if rehearse:
        mine |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    else:
        mine |= {"JAX_PLATFORMS": "cuda,cpu"}  # the definitions run on the CPU
    return dict(os.environ) | mine


def run(
    first: Job,
    stages: Sequence[tuple[Sequence[Job], int]],
    *,
    out: Path,
    title: str,
    until: float,
    variables: Mapping[str, str],
    whole: bool = False,
    before: Mapping[str, Any] | None = None,
) -> int:
    """Run `first`, and where it passes every stage of (jobs, how many at once); return the exit code.

    Args:
      whole: whether it fails if any job was not reached.
      before: an earlier record, with whose benchmarks to go on.
    """
    record = Record(out, title, whole)
    with tempfile.TemporaryDirectory() as scratch:
        if before:
            keep(before, Path(scratch))

        def stage(jobs: Sequence[Job], at_once: int) -> None:
            run_all(
                jobs,
                folder=Path(scratch),
                until=until,
                environment=variables,
                changed=record.changed,
                at_once=at_once,
            )

        stage([first], 1)
        begun = record.outcomes[first.name]
        record.machine = begun.result
        if begun.status == PASSED:
            for jobs, at_once in stages:
                stage(jobs, at_once)
    print(f"\n{record.summary()}\n{out / 'hopper.json'}")
    return 1 if record.wrong() else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="hopper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, help="all of it ends within these; default 9, of a rehearsal 14"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/hopper"), help="folder of the results, default runs/hopper/"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the jobs import from")
    parser.add_argument("--rehearse", action="store_true", help="on CPU, interpreted, tiny shapes")
    parser.add_argument("--only", nargs="+", default=[], help="only jobs whose name has one of these in it")
    parser.add_argument(
        "--at-once", type=int, help="conformance jobs side by side; default half of the cores"
    )
    parser.add_argument(
        "--go-on", type=Path, metavar="FILE", help="an earlier hopper.json, to add benchmarks to"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="write a hopper.json's benchmarks to results/"
    )
    options = parser.parse_args(arguments)
    if options.keep:
        if not (record := read_json(options.keep)):
            sys.exit(f"--keep: got {options.keep}; expected a hopper.json of an earlier run")
        if not str((record["machine"] or {}).get("chip")).startswith("NVIDIA"):
            sys.exit(f"--keep: got {options.keep}, a {record['run']}; expected a run on a GPU")
        print(*keep(record, RESULTS), sep="\n")
        return 0

    def chosen(jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if not options.only or any(text in job.name for text in options.only)]

    stages = [
        (chosen(plan.conformance(options.rehearse)), options.at_once or max(1, (os.cpu_count() or 1) // 2)),
        (chosen(plan.benchmarks(options.rehearse)), 1),
    ]
    if not any(jobs for jobs, _ in stages):
        names = [job.name for jobs in (plan.conformance(True), plan.benchmarks(False)) for job in jobs]
        sys.exit(f"--only: got {options.only}; expected text of one of these:\n" + "\n".join(names))
    with tempfile.TemporaryDirectory() as scratch:
        return run(
            plan.machine(options.rehearse),
            stages,
            out=options.out,
            title="rehearsal: interpreted on CPU, tiny shapes" if options.rehearse else "on the chip",
            until=start + 60 * (options.minutes or (14 if options.rehearse else 9)),
            whole=options.rehearse,
            before=read_json(options.go_on) if options.go_on else None,
            variables=environment(import_paths(Path(scratch), options.wheels), options.rehearse),
        )


if __name__ == "__main__":
    sys.exit(main())
