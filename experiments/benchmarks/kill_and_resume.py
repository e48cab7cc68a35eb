"""Kill one of several processes again and again, and compare with a run that nobody disturbed.

  python -m experiments.benchmarks.kill_and_resume --kills=50

Trains a small model in --processes processes, sends SIGKILL to one of them at a random moment (while they
start, compile, train or save), and starts the same command again. A run that comes to its end is compared
with the undisturbed one, step by step, and the next one begins, until --kills have been sent. Writes --json.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

from experiments.benchmarks.interleaved import about, save
from experiments.launcher.local import Died, flags_of, run_job
from experiments.trainer.metrics import read_lines

FIELDS = {
    "batch_size": 4,
    "model.width": 16,
    "data.sequence_length": 32,
    "data.path": "experiments/data",  # small, so that runs start soon
    "optimizer.warmup_steps": 2,
    "checkpoint.every": 10,
    "evaluation.enabled": False,
    "sample.tokens": 0,
    "tensorboard": False,
}
LOSSES = ("loss", "grad_norm", "update_norm")


def train(args: argparse.Namespace, folder: Path, started=lambda ids: None) -> None:
    """Start the run, or go on with it; RuntimeError with its last lines if it takes longer than --limit."""
    fields = FIELDS | {"steps": args.steps}
    given = [f"--config={args.config}", *flags_of(fields), f"--run={folder}"]
    lines: deque[str] = deque(maxlen=20)
    late, running = threading.Event(), list[int]()

    def end():
        late.set()
        for number in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def begin(ids):
        running.extend(ids)
        timer.start()
        started(ids)

    timer = threading.Timer(args.limit, end)
    timer.daemon = True
    try:
        run_job(given, args.processes, say=lines.append, started=begin)
    except Died as error:
        if late.is_set():
            told = "\n".join(lines)
            raise RuntimeError(
                f"a run took longer than {args.limit} s, and was ended. It said:\n{told}"
            ) from error
        raise
    finally:
        timer.cancel()


def losses(folder: Path) -> dict[int, list[float]]:
    """The losses of every step that a run has logged."""
    return {int(x["step"]): [x[name] for name in LOSSES] for x in read_lines(folder / "metrics.jsonl")}


def run_and_kill(args: argparse.Namespace, folder: Path, after: float, victim: int) -> str:
    """Run, with a SIGKILL to one process after some seconds: what the run did then, or "finished" before."""
    ended = threading.Event()
    seen: list[str] = []

    def kill(ids):
        before = len(losses(folder))

        def wait():
            if not ended.wait(after):
                now = len(losses(folder))
                seen.append("starting" if now <= before else "training" if now < args.steps else "ending")
                os.kill(ids[victim], signal.SIGKILL)

        threading.Thread(target=wait, daemon=True).start()

    try:
        train(args, folder, started=kill)
    except Died as error:
        if f"process {victim} of {args.processes} was killed by SIGKILL" not in str(error):
            raise  # it failed by itself
        return seen[0]
    finally:
        ended.set()
    return "finished"


def main(argv: list[str] | None = None) -> None:
    """Parse arguments, run, and write the result."""
    parser = argparse.ArgumentParser(
        prog="experiments.benchmarks.kill_and_resume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config = "experiments/configs/lm/quickstart.py:smoke"
    parser.add_argument("--config", default=config, help="what is trained (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=50, help="how many SIGKILLs (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="of each run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--seconds", type=float, default=1e9, help="send no more kills after so long")
    parser.add_argument(
        "--limit", type=float, default=900, help="seconds of one run before it counts as hung"
    )
    parser.add_argument("--json", default="kill_and_resume.json", help="the result (default: %(default)s)")
    args = parser.parse_args(argv)
    random.seed(args.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{work}/compiled")  # most of the time is start-up
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        whole, folder = Path(work, "whole"), Path(work, "killed")
        train(args, whole)  # fills the cache
        shutil.rmtree(whole)
        start = time.monotonic()
        train(args, whole)
        seconds = time.monotonic() - start
        expected = losses(whole)

        kills = {"starting": 0, "training": 0, "ending": 0}
        compared, differing, worst = 0, 0, 0.0

        def compare():
            nonlocal compared, differing, worst
            found = losses(folder)
            assert found.keys() == expected.keys(), f"{folder}: steps are missing, or too many"
            gaps = [abs(a - b) / abs(b) for n in expected for a, b in zip(found[n], expected[n], strict=True)]
            compared, differing = compared + 1, differing + any(gaps)
            worst = max(worst, *gaps)
            shutil.rmtree(folder)

        with tqdm(total=args.kills, unit="kill") as bar:
            while sum(kills.values()) < args.kills and time.monotonic() - began < args.seconds:
                after, victim = random.uniform(0, seconds), random.randrange(args.processes)
                when = run_and_kill(args, folder, after, victim)
                if when == "finished":
                    compare()
                else:
                    kills[when] += 1
                    bar.update()
        if folder.exists():
            train(args, folder)
            compare()
    result = about() | {
        "benchmark": "experiments.benchmarks.kill_and_resume",
        "config": args.config,
        "processes": args.processes,
        "steps": args.steps,
        "seconds_undisturbed": round(seconds, 1),
        "seconds": round(time.monotonic() - began, 1),
        "kills": kills,
        "runs_compared": compared,
        "runs_that_differ": differing,
        "largest_relative_difference": worst,
    }
    save(Path(args.json), result)


if __name__ == "__main__":
    main()
