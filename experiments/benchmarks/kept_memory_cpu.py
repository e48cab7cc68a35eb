"""Training steps of the quickstart on CPU in small pages, huge pages, and huge pages that are kept.

python -m experiments.benchmarks.kept_memory_cpu
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
from experiments.trainer.kept_memory import KEPT

RESULTS = Path(__file__).parent / "results" / "kept_memory_cpu.json"
STEPS = 5  # of a turn
WAYS = {
    "small pages": "glibc.malloc.hugetlb=0",
    "huge pages": "glibc.malloc.hugetlb=1",
    "huge pages, kept": KEPT,
}


def work() -> None:
    """Take STEPS steps for every line that comes; tell one's ms and page faults, and the peak in MB."""
    training = prepare(get_config())
    state, batch = training.state, dict(next(training.batches))
    state = jax.block_until_ready(training.step(state, batch)[0])
    print("ready", flush=True)
    for _ in sys.stdin:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(STEPS):
            state, _metrics = training.step(state, batch)
        jax.block_until_ready(state)
        spent = 1e3 * (time.perf_counter() - start) / STEPS
        after = resource.getrusage(resource.RUSAGE_SELF)
        print(spent, (after.ru_minflt - before.ru_minflt) / STEPS, after.ru_maxrss / 1024, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    result, workers = about(), []
    for tunables in WAYS.values():
        environment = os.environ | {"GLIBC_TUNABLES": tunables}
        code = "from experiments.benchmarks.kept_memory_cpu import work; work()"
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", code]
        workers.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment))
    for worker in workers:
        while worker.stdout.readline() not in ("ready\n", ""):
            pass
    found: list[list[list[float]]] = [[] for _ in WAYS]
    for _ in range(args.turns):
        for rows, worker in zip(found, workers, strict=True):
            worker.stdin.write("\n")
            worker.stdin.flush()
            rows.append([float(x) for x in worker.stdout.readline().split()])
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    times, faults, peaks = np.moveaxis(np.array(found), -1, 0)  # [way, turn]
    quarters = ("first quartile", "median", "third quartile")
    faster = np.quantile(times[0] / times, [0.25, 0.5, 0.75], axis=1).T.round(3).tolist()
    result |= {"turns": args.turns, "ways": {}}
    for i, way in enumerate(WAYS):
        result["ways"][way] = {
            "ms_a_step": round(float(np.median(times[i])), 1),
            "page_faults_a_step": round(float(np.median(faults[i])), 1),
            "peak_MB": round(float(peaks[i, -1])),
            "times_faster": dict(zip(quarters, faster[i], strict=True)),
        }
    save(args.out, result)


if __name__ == "__main__":
    main()
