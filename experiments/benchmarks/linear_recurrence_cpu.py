"""The portable linear_recurrence against lax.scan and lax.associative_scan on CPU, in one interleaved run.

python -m experiments.benchmarks.linear_recurrence_cpu
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

import frugax
from experiments.benchmarks.interleaved import about, compare, save

RESULTS = Path(__file__).parent / "results" / "linear_recurrence_cpu.json"


def ours(a_BTD, b_BTD):
    return frugax.kernels.linear_recurrence(a_BTD, b_BTD, backend="xla")[0]


def token_scan(a_BTD, b_BTD):
    def step(h_BD, token):
        h_BD = token[0] * h_BD + token[1]
        return h_BD, h_BD

    tokens = jnp.moveaxis(a_BTD, 1, 0), jnp.moveaxis(b_BTD, 1, 0)
    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(b_BTD[:, 0]), tokens)[1], 0, 1)


def associative_scan(a_BTD, b_BTD):
    def compose(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(compose, (a_BTD, b_BTD), axis=1)[1]


CONTENDERS = {"frugax": ours, "lax.scan": token_scan, "lax.associative_scan": associative_scan}


def measure(shape: tuple[int, int, int], repeats: int) -> dict:
    a, b, dh = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))
    args = jax.nn.sigmoid(a + 2), b
    return compare(CONTENDERS, args, dh, reference="lax.scan", bound=1e-5, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", default=["4,2048,512", "1,2048,256"], help="batch,time,channels"
    )
    parser.add_argument("--repeats", type=int, default=21, help="timed runs of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes]
    results = {str(list(shape)): measure(shape, args.repeats) for shape in shapes}
    save(args.out, about() | {"dtype": "float32", "repeats": args.repeats, "results": results})


if __name__ == "__main__":
    main()
