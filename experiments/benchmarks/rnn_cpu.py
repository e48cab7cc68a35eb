"""frugax's LSTM against Flax's nn.RNN(OptimizedLSTMCell) and a plain lax.scan on CPU, in one interleaved run.

    python -m experiments.benchmarks.rnn_cpu

Both map x [B, T, D] to h [B, T, D] with the same weights, the product with W included.
"""

import argparse
import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn

import frugax
from experiments.benchmarks.interleaved import about, compare, save

RESULTS = Path(__file__).parent / "results" / "rnn_cpu.json"


def ours(backend):
    def run(x_BTD, W_DGD, R_DGD, bias_GD):
        gates = jnp.einsum("btd,dgo->btgo", x_BTD, W_DGD)[:, :, None]
        recurrent_HGDD = jnp.moveaxis(R_DGD, 0, 1)[None]
        return frugax.kernels.rnn(gates, recurrent_HGDD, bias_GD[None], cell="lstm", backend=backend)[0][
            :, :, 0
        ]

    return run


def plain_scan(x_BTD, W_DGD, R_DGD, bias_GD):
    """What one writes by hand: the gradient of R is added up step by step."""

    def step(carry, x_BGD):
        h, c = carry
        i, f, z, o = jnp.moveaxis(x_BGD + jnp.einsum("bd,dgo->bgo", h, R_DGD) + bias_GD, 1, 0)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(z)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    gates = jnp.einsum("btd,dgo->tbgo", x_BTD, W_DGD)
    zeros = jnp.zeros_like(x_BTD[:, 0])
    return jnp.moveaxis(jax.lax.scan(step, (zeros, zeros), gates)[1], 0, 1)


def flax_rnn(x_BTD, W_DGD, R_DGD, bias_GD):
    parameters = {}
    for g, name in enumerate("ifgo"):
        parameters[f"i{name}"] = {"kernel": W_DGD[:, g]}
        parameters[f"h{name}"] = {"kernel": R_DGD[:, g], "bias": bias_GD[g]}
    return nn.RNN(nn.OptimizedLSTMCell(x_BTD.shape[-1])).apply({"params": {"cell": parameters}}, x_BTD)


CONTENDERS = {
    "frugax": ours(None),
    "frugax xla": ours("xla"),
    "lax.scan": plain_scan,
    "flax nn.RNN": flax_rnn,
}


def measure(shape: tuple[int, int, int], repeats: int) -> dict:
    D = shape[2]
    keys = jax.random.split(jax.random.key(0), 5)
    x, dh = (jax.random.normal(key, shape) for key in keys[:2])
    W, R = (jax.random.normal(key, (D, 4, D)) / D**0.5 for key in keys[2:4])
    args = x, W, R, jax.random.normal(keys[4], (4, D))
    return compare(CONTENDERS, args, dh, reference="lax.scan", bound=1e-4, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", default=["16,256,256", "4,512,128", "32,128,512"], help="batch,time,channels"
    )
    parser.add_argument("--repeats", type=int, default=11, help="timed runs of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes]
    result = {
        "flax": importlib.metadata.version("flax"),
        "dtype": "float32",
        "cell": "lstm",
        "repeats": args.repeats,
        "results": {str(list(shape)): measure(shape, args.repeats) for shape in shapes},
    }
    save(args.out, about() | result)


if __name__ == "__main__":
    main()
