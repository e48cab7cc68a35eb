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
from experiments.configs.quickstart import get_config
from experiments.data import find_corpus, load_tokenizer, make_loader
from experiments.optimizers import make_optimizer
from experiments.runs import build_model
from experiments.state import init_state, make_train_step

RESULTS = Path(__file__).parent / "results" / "huge_pages_cpu.json"
STEPS = 5  # of a turn


def work() -> None:
    """Take STEPS steps for every line that comes, and tell what one took."""
    config, tokenizer = get_config(), load_tokenizer(None)
    config.model.vocab_size = tokenizer.vocab_size
    batches = make_loader(
        find_corpus(None, heldout=config.data.held_out),
        tokenizer,
        batch_size=config.batch_size,
        seq_len=config.data.sequence_length,
        seed=config.seed,
        process_index=0,
        process_count=1,
    )
    batch, module, optimizer = (
        dict(next(batches)),
        build_model(config),
        make_optimizer(config.optimizer, config.steps),
    )
    state = jax.jit(lambda: init_state(module, optimizer, config.seed, 0.0))()
    step = make_train_step(module, optimizer, accumulate=1, ema_decay=0.0)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    state = jax.block_until_ready(compiled(state, batch)[0])
    print("ready", flush=True)
    for _ in sys.stdin:
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for _ in range(STEPS):
            state, _metrics = compiled(state, batch)
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
    small, huge = np.array(found)
    save(
        args.out,
        result
        | {
            "turns": args.turns,
            "ms_a_step": {"small pages": np.median(small[:, 0]), "huge pages": np.median(huge[:, 0])},
            "page_faults_a_step": {
                "small pages": np.median(small[:, 1]),
                "huge pages": np.median(huge[:, 1]),
            },
            "times_faster": dict(
                zip(
                    ("first quartile", "median", "third quartile"),
                    np.quantile(small[:, 0] / huge[:, 0], [0.25, 0.5, 0.75]).round(3).tolist(),
                    strict=True,
                )
            ),
        },
    )


if __name__ == "__main__":
    main()
