"""frugax's LSTM against a plain lax.scan, Flax's nn.RNN and torch's LSTM on CPU, in one interleaved run.

    python -m experiments.benchmarks.rnn_cpu

All map x [B, T, D] to h [B, T, D] with the same weights, the product with W included. torch takes part where
it is installed (the `parity` extra), with as many threads as there are cores.
"""

import argparse
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import frugax
from experiments.benchmarks.interleaved import about, compare, cores, save

RESULTS = Path(__file__).parent / "results" / "rnn_cpu.json"


def ours(x_BTD, W_DGD, R_DGD, bias_GD):
    gates_BTHGD = jnp.einsum("btd,dgo->btgo", x_BTD, W_DGD)[:, :, None]
    recurrent_HGDD = jnp.moveaxis(R_DGD, 0, 1)[None]
    return frugax.kernels.rnn(gates_BTHGD, recurrent_HGDD, bias_GD[None], cell="lstm")[0][:, :, 0]


def plain_scan(x_BTD, W_DGD, R_DGD, bias_GD):
    """The form that one writes by hand: the gradient of R is added up step by step."""

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


def torch_lstm(x_BTD, W_DGD, R_DGD, bias_GD, dh_BTD) -> dict[tuple[str, str], Callable[[], Any]]:
    """torch's calls; gradients come in the shapes of the arguments."""
    import torch

    torch.set_num_threads(cores())
    D = x_BTD.shape[-1]
    x, W, R, bias, dh = (torch.tensor(np.asarray(a)) for a in (x_BTD, W_DGD, R_DGD, bias_GD, dh_BTD))
    x.requires_grad_()
    module: Any = torch.nn.LSTM(D, D, batch_first=True)
    weights = [module.weight_ih_l0, module.weight_hh_l0, module.bias_hh_l0]
    values = W.reshape(D, -1).T, R.reshape(D, -1).T, bias.ravel()
    with torch.no_grad():
        module.bias_ih_l0.zero_()
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)

    def forward():
        with torch.no_grad():
            return module(x)[0].numpy()

    def both():
        h = module(x)[0]
        dx, dW, dR, dbias = torch.autograd.grad(h, [x, *weights], dh)
        dW, dR = (d.T.reshape(D, 4, D) for d in (dW, dR))
        return h.detach().numpy(), tuple(d.numpy() for d in (dx, dW, dR, dbias.reshape(4, D)))

    return {("torch nn.LSTM", "forward"): forward, ("torch nn.LSTM", "forward+gradient"): both}


CONTENDERS = {"frugax": ours, "lax.scan": plain_scan, "flax nn.RNN": flax_rnn}
HAS_TORCH = importlib.util.find_spec("torch") is not None


def measure(shape: tuple[int, int, int], repeats: int) -> dict:
    D = shape[2]
    keys = jax.random.split(jax.random.key(0), 5)
    x, dh = (jax.random.normal(key, shape) for key in keys[:2])
    W, R = (jax.random.normal(key, (D, 4, D)) / D**0.5 for key in keys[2:4])
    args = x, W, R, jax.random.normal(keys[4], (4, D))
    others = torch_lstm(*args, dh) if HAS_TORCH else None
    rows = compare(CONTENDERS, args, dh, reference="lax.scan", bound=1e-4, repeats=repeats, others=others)
    for name, row in rows.items():
        ours_ms = rows[f"frugax, {name.split(', ')[1]}"]["median_ms"]
        row["time_over_frugax"] = round(row["median_ms"] / ours_ms, 2)
    return rows


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
        "torch": importlib.metadata.version("torch") if HAS_TORCH else None,
        "dtype": "float32",
        "cell": "lstm",
        "repeats": args.repeats,
        "results": {str(list(shape)): measure(shape, args.repeats) for shape in shapes},
    }
    save(args.out, about() | result)


if __name__ == "__main__":
    main()
