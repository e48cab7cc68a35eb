"""Training steps of the quickstart on CPU with and without huge pages, by turns in two processes.

python -m experiments.benchmarks.huge_pages_cpu
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from experiments.benchmarks.interleaved import about, save
from experiments.benchmarks.training import prepare
from experiments.configs.lm.quickstart import get_config

RESULTS = Path(__file__).parent / "results" / "huge_pages_cpu.json"
STEPS = 5  # of a turn


def work() -> None:
    """Take STEPS steps for every line that comes, and tell what one took."""
    training = prepare(get_config())
    state, batch = training.state, dict(next(training.batches))
    state = jax.block_until_ready(training.step(state, batch)[0])
    print("ready", flush=True)
    for _ in sys.stdin:
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for _ in range(STEPS):
            state, _metrics = training.step(state, batch)
        jax.block_until_ready(state)
        spent = 1e3 * (time.perf_counter() - start) / STEPS
        print(spent, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / STEPS, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    result, workers = about(), []
    for huge in (0, 1):
        environment = os.environ | {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb={huge}"}
        code = "from experiments.benchmarks.huge_pages_cpu import work; work()"
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", code]
        workers.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment))
    for worker in workers:
        while worker.stdout.readline() not in ("ready\n", ""):
            pass
    found: list[list[list[float]]] = [[], []]
    for _ in range(args.turns):
        for rows, worker in zip(found, workers, strict=True):
            worker.stdin.write("\n")
            worker.stdin.flush()
            rows.append([float(x) for x in worker.stdout.readline().split()])
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    times, faults = np.moveaxis(np.array(found), -1, 0)  # [small or huge, turn]
    pages, quarters = ("small pages", "huge pages"), ("first quartile", "median", "third quartile")
    faster = np.quantile(times[0] / times[1], [0.25, 0.5, 0.75]).round(3)
    result |= {
        "turns": args.turns,
        "ms_a_step": dict(zip(pages, np.median(times, axis=1).tolist(), strict=True)),
        "page_faults_a_step": dict(zip(pages, np.median(faults, axis=1).tolist(), strict=True)),
        "times_faster": dict(zip(quarters, faster.tolist(), strict=True)),
    }
    save(args.out, result)


if __name__ == "__main__":
    main()
