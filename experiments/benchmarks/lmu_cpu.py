"""The LMU's two forms on CPU, a recurrence and a convolution, over lengths and orders: which one is faster.

python -m experiments.benchmarks.lmu_cpu
"""

import argparse
from functools import partial
from pathlib import Path

import jax

import frugax
from experiments.benchmarks.interleaved import about, compare, save

RESULTS = Path(__file__).parent / "results" / "lmu_cpu.json"
LENGTHS = (4, 8, 16, 32, 64, 256)
SIZES = ((32, 1, 64), (32, 1, 256), (8, 128, 16))  # batch, signals, order; LMUFormer has one signal


def memory(method, theta, order, u):
    return frugax.kernels.lmu(u, order, theta, method=method)[0]


def measure(size: tuple[int, int, int], time: int, repeats: int) -> dict:
    batch, channels, order = size
    keys = jax.random.split(jax.random.key(0))
    u = jax.random.normal(keys[0], (batch, time, channels))
    dm = jax.random.normal(keys[1], (batch, time, channels, order))
    contenders = {method: partial(memory, method, 784.0, order) for method in ("recurrent", "fft")}
    rows = compare(contenders, (u,), dm, reference="recurrent", bound=1e-4, repeats=repeats)
    for passes in ("forward", "forward+gradient"):
        ms = {method: rows[f"{method}, {passes}"]["median_ms"] for method in contenders}
        rows[f"{passes}, fft over recurrent"] = round(ms["fft"] / ms["recurrent"], 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=51, help="timed runs of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    results = {
        str(list(size)): {str(time): measure(size, time, args.repeats) for time in LENGTHS} for size in SIZES
    }
    what = {"sizes": "batch, signals, order", "dtype": "float32", "repeats": args.repeats}
    save(args.out, about() | what | {"results": results})


if __name__ == "__main__":
    main()
