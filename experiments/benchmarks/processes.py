"""Compare the throughput of two processes on two cores with that of one pinned to one core.

  python -m experiments.benchmarks.processes

Both train the same config with the same batches, in turns, --rounds times; the speed of a run is the median
over its later half of steps. On a machine where nothing else runs. The launcher gives each of the two a core.
Writes --json.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from experiments.benchmarks.interleaved import about, save
from experiments.launcher.local import flags_of, run_job
from experiments.trainer.metrics import read_lines

FIELDS = {"checkpoint.every": 0, "evaluation.enabled": False, "sample.tokens": 0, "tensorboard": False}


def tokens_per_second(config: str, steps: int, processes: int, cores: set[int]) -> float:
    """The median speed of a new run on these cores, from the middle of its steps on."""
    here = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # which the processes take over
    try:
        with tempfile.TemporaryDirectory() as folder:
            fields = FIELDS | {"steps": steps, "optimizer.warmup_steps": 1}
            given = [f"--config={config}", *flags_of(fields), f"--run={folder}"]
            run_job(given, processes, say=lambda line: None)
            lines = read_lines(Path(folder, "metrics.jsonl"))
    finally:
        os.sched_setaffinity(0, here)
    return statistics.median(line["tokens_per_second"] for line in lines[len(lines) // 2 :])


def main(argv: list[str] | None = None) -> None:
    """Parse arguments, measure, and write the result."""
    parser = argparse.ArgumentParser(
        prog="experiments.benchmarks.processes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config = "experiments/configs/lm/quickstart.py"
    parser.add_argument("--config", default=config, help="what is trained (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both (default: %(default)s)")
    parser.add_argument("--json", default="processes.json", help="the result (default: %(default)s)")
    args = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        parser.error(f"cores: got {len(cores)}; expected two")
    one, two = [], []
    with tempfile.TemporaryDirectory() as compiled:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)  # most of the time is start-up
        for number in range(args.rounds):
            one.append(tokens_per_second(args.config, args.steps, 1, {cores[0]}))
            two.append(tokens_per_second(args.config, args.steps, 2, set(cores)))
            print(f"round {number + 1}: one process {one[-1]:,.0f} tokens/s, two {two[-1]:,.0f}", flush=True)
    result = about() | {
        "benchmark": "experiments.benchmarks.processes",
        "config": args.config,
        "one_process_on_one_core": one,
        "two_processes_on_two_cores": two,
        "ratio": round(statistics.median(two) / statistics.median(one), 3),
    }
    save(Path(args.json), result)


if __name__ == "__main__":
    main()
