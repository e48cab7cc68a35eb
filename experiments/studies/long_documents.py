"""Plans for documents of very different lengths: balance and bytes of attention, groups of several degrees.

  python -m experiments.studies.long_documents             a minute on a core; writes the JSON
  python -m experiments.studies.long_documents --smoke     seconds, and writes nothing

Lengths are drawn from a long-tailed distribution and cut at the longest that is allowed. In the first part
ranks hold equally many tokens of packed documents, and do the attention of their own (packed), of a part of
each document (split by document), or of what `frugax.planner.balance_core_attention` gives them. Imbalance is
the busiest rank's work over the mean. Bytes are those of one layer's forward pass, with a width of 4096 and a
quarter as many key heads in bfloat16. In the second part `frugax.planner.plan_groups` forms groups of devices
for a step's sequences, beside the best single degree. Seconds are those of the cost model, with all-to-alls
at 150 GB/s in a node of eight and 10 GB/s out of it.

Source: Core Attention Disaggregation (arXiv 2510.18121) and FlexSP (arXiv 2412.01523).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.interleaved import about
from frugax.planner import (
    CoreTask,
    SequenceCosts,
    balance_core_attention,
    core_balance,
    group_seconds,
    plan_groups,
    sequence_parallel_tasks,
)

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "long_documents.json"
QUERY_BYTES, KEY_BYTES = 2 * 4096, 2 * 2 * 1024
BLOCK = 128  # queries
FAST, SLOW, NODE = 150e9, 10e9, 8


def lengths_of(rng: np.random.Generator, longest: int) -> int:
    """One document's tokens: most are short, a few as long as can be."""
    return max(16, min(longest, int(np.exp(rng.normal(8.0, 1.6)))))


def packed(rng: np.random.Generator, ranks: int, tokens: int) -> tuple[list[int], list[int]]:
    """Documents that fill ranks with equally many tokens, cut where one is full: lengths, and ranks."""
    lengths, homes = [], []
    for rank in range(ranks):
        room = tokens
        while room:
            lengths.append(min(room, lengths_of(rng, tokens)))
            homes.append(rank)
            room -= lengths[-1]
    return lengths, homes


def attention(ranks: int, tokens: int, batches: int) -> dict[str, dict[str, float]]:
    """Imbalance and gigabytes of three ways to share attention, means over batches."""
    rng = np.random.default_rng(0)
    costs = {"servers": ranks, "query_bytes": QUERY_BYTES, "key_bytes": KEY_BYTES}
    found: dict[str, list[Any]] = {"packed": [], "split by document": [], "balanced": []}
    for _ in range(batches):
        lengths, homes = packed(rng, ranks, tokens)
        own = [CoreTask(i, (0, n), (0, n), h, h) for i, (n, h) in enumerate(zip(lengths, homes, strict=True))]
        ways = {
            "packed": own,
            "split by document": sequence_parallel_tasks(lengths, ranks),
            "balanced": balance_core_attention(lengths, homes, **costs, block=BLOCK),
        }
        for name, tasks in ways.items():
            found[name].append(core_balance(tasks, **costs))
    return {
        name: {
            "imbalance": round(float(np.mean([b.imbalance for b in all_])), 3),
            "GB": round(float(np.mean([b.bytes for b in all_])) / 1e9, 3),
        }
        for name, all_ in found.items()
    }


def groups(devices: int, longest: int, steps: int, seconds: float) -> list[dict[str, Any]]:
    """Seconds of steps by the model, with groups of several degrees and with the best single one."""
    rng = np.random.default_rng(1)
    # A 7B model: 6 * 7e9 FLOPs a token, 32 layers' scores, and 4 + 4 all-to-alls a layer, at 400 TFLOP/s.
    degrees = [d for d in (1, 2, 4, 8, 16, 32) if d <= devices]
    costs = SequenceCosts(
        quadratic=32 * 3 * 2 * 4096 / 400e12,
        linear=6 * 7e9 / 400e12,
        fixed=0.2,
        moved=32 * 8 * QUERY_BYTES,
        bandwidth={d: FAST if d <= NODE else SLOW for d in degrees},
        capacity=longest // devices,
    )
    rows = []
    for _ in range(steps):
        lengths: list[int] = []
        while sum(lengths) < 0.7 * costs.capacity * devices:
            lengths.append(lengths_of(rng, longest // 2))
        plan = plan_groups(lengths, devices, costs, buckets=12, time_limit=seconds)
        static = {}
        for degree in degrees:
            one = costs._replace(bandwidth={degree: costs.bandwidth[degree]})
            try:
                single = plan_groups(lengths, devices, one, buckets=12, time_limit=seconds)
            except ValueError:  # a sequence is too long for it
                continue
            static[degree] = group_seconds(single, lengths, costs)
        best = min(static, key=static.__getitem__)
        rows.append(
            {
                "sequences": len(lengths),
                "longest": max(lengths),
                "degrees": [g.degree for g in plan],
                "seconds": round(group_seconds(plan, lengths, costs), 3),
                "best_degree": best,
                "its_seconds": round(static[best], 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one small batch; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args(argv)
    if args.smoke:
        print(attention(4, 2**13, 1))
        groups(8, 2**16, 1, 1.0)
        return
    shares = {}
    for ranks, tokens in ((8, 2**16), (8, 2**18), (32, 2**18)):
        name = f"{ranks} ranks of {tokens // 1024}k"
        shares[name] = attention(ranks, tokens, 8)
        print(name, shares[name], flush=True)
    result = {"batches": 8, "attention": shares, "groups": groups(16, 2**18, 5, 5.0)}
    args.out.write_text(json.dumps(about() | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
