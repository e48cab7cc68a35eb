"""The portable causal_conv1d against XLA's own grouped convolution on CPU, in one interleaved run.

python -m experiments.benchmarks.causal_conv1d_cpu
"""

import argparse
from pathlib import Path

import jax

import frugax
from experiments.benchmarks.interleaved import about, compare, save

RESULTS = Path(__file__).parent / "results" / "causal_conv1d_cpu.json"


def ours(x_BTD, weight_WD, bias_D):
    return frugax.kernels.causal_conv1d(x_BTD, weight_WD, bias_D, activation="silu", backend="xla")[0]


def grouped_convolution(x_BTD, weight_WD, bias_D):
    W, D = weight_WD.shape
    z_BTD = jax.lax.conv_general_dilated(
        x_BTD,
        weight_WD[:, None],
        window_strides=(1,),
        padding=[(W - 1, 0)],
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=D,
    )
    return jax.nn.silu(z_BTD + bias_D)


def measure(shape: tuple[int, int, int], width: int, repeats: int) -> dict:
    D = shape[2]
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [shape, (width, D), (D,), shape]
    *args, dy = (jax.random.normal(k, s) for k, s in zip(keys, sizes, strict=True))
    contenders = {"frugax": ours, "conv_general_dilated": grouped_convolution}
    return compare(contenders, args, dy, reference="conv_general_dilated", bound=1e-5, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="4,2048,512", help="batch, time, channels")
    parser.add_argument("--width", type=int, default=4, help="taps of the filter")
    parser.add_argument("--repeats", type=int, default=11, help="timed runs of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    B, T, D = map(int, args.shape.split(","))
    result = {
        "shape": [B, T, D],
        "width": args.width,
        "dtype": "float32",
        "activation": "silu",
        "repeats": args.repeats,
        "results": measure((B, T, D), args.width, args.repeats),
    }
    save(args.out, about() | result)


if __name__ == "__main__":
    main()
