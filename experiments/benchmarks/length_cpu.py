"""Time a token of lightning attention, over lengths up to a million tokens, on a CPU.

  python -m experiments.benchmarks.length_cpu      two minutes on two cores; writes the JSON

Two heads of 32 channels with the fixed decays of `LightningAttention`; forward and gradient. A time is CPU
seconds of the process, the median over turns: they count what is done, whatever else runs on the machine.

Source: Qin et al. 2024, Lightning Attention (arXiv 2405.17381), whose claim is constant speed over length.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp

import frugax
from experiments.benchmarks.interleaved import about, cpu_seconds, save

RESULTS = Path(__file__).parent / "results" / "length_cpu.json"
LENGTHS, TURNS, HEADS, WIDTH = (4096, 16384, 65536, 262144, 1048576), 3, 2, 32


def rows(lengths: tuple[int, ...], turns: int) -> list[dict[str, float]]:
    """CPU nanoseconds a token of the forward pass, and of both, at each length."""
    log_decay = -(2.0 ** -jnp.arange(1.0, HEADS + 1))

    def attend(q, k, v):
        return frugax.kernels.linear_attention(q, k, v, log_decay, backend="xla")[0]

    def both(q, k, v):
        return jax.value_and_grad(lambda *a: jnp.sum(attend(*a) ** 2), argnums=(0, 1, 2))(q, k, v)

    passes = {"forward": jax.jit(attend), "forward_and_gradient": jax.jit(both)}
    found: dict[tuple[int, str], list[float]] = {}
    for turn in range(turns + 1):  # the first compiles
        for T in lengths:
            x = jax.random.normal(jax.random.key(T), (1, T, HEADS, WIDTH))
            for name, run in passes.items():
                seconds = cpu_seconds(partial(_wait, run, x))
                if turn:
                    found.setdefault((T, name), []).append(1e9 * seconds / T)
    return [
        {"tokens": T} | {f"{name}_ns": round(median(found[T, name]), 1) for name in passes} for T in lengths
    ]


def _wait(run: Callable, x: jax.Array) -> None:
    jax.block_until_ready(run(x, x, x))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    task = {"heads": HEADS, "width": WIDTH, "turns": TURNS}
    save(args.out, about() | task | {"rows": rows(LENGTHS, TURNS)})


if __name__ == "__main__":
    main()
