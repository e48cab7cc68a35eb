"""One small model in the containers of five libraries: its params, and the loss as a function of them."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

LAYERS, INPUTS, WIDTH, OUTPUTS = 2, 8, 6, 4


def loss_of(layers, out, bias):
    """The loss of a residual stack of layers and an affine map, from float32 arrays."""
    x = np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)
    for w in layers:
        x = x + jnp.tanh(x @ w)
    return jnp.mean((x @ out + bias[None] - 1) ** 2)


def arrays():
    rng = np.random.default_rng(1)
    layers, out = (
        rng.normal(size=shape) / WIDTH**0.5 for shape in ((LAYERS, WIDTH, WIDTH), (WIDTH, OUTPUTS))
    )
    return tuple(jnp.asarray(x, jnp.float32) for x in (layers, out, np.zeros(OUTPUTS)))


def linen(box=lambda init, *_: init):
    class Layers(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param("kernel", box(lambda _: arrays()[0], (None, None, "model")))

    class Out(nn.Module):
        @nn.compact
        def __call__(self):
            bias = self.param("bias", box(lambda _: arrays()[2], ("model",)))
            return self.param("kernel", box(lambda _: arrays()[1], (None, "model"))), bias

    class Model(nn.Module):
        @nn.compact
        def __call__(self):
            return loss_of(Layers(name="layers")(), *Out(name="out")())

    model = Model()
    return model.init(jax.random.key(0))["params"], lambda params: model.apply({"params": params})


def boxed():
    return linen(nn.with_partitioning)


def plain():
    layers, out, bias = arrays()
    params = {"layers": {"w1": layers}, "w": out, "b": bias}
    return params, lambda p: loss_of(p["layers"]["w1"], p["w"], p["b"])


def haiku():
    """Haiku's dicts, of which a module's whole path is one key."""
    layers, out, bias = arrays()
    params = {"net/~/layers/linear": {"w": layers}, "net/~/linear": {"b": bias, "w": out}}
    return params, lambda p: loss_of(
        p["net/~/layers/linear"]["w"], *p["net/~/linear"].values().__reversed__()
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """A layer as Equinox has it: a pytree by attributes, weights [out, in]."""

    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    layers: Linear
    out: Linear


def equinox():
    layers, out, bias = arrays()
    model = Model(Linear(jnp.swapaxes(layers, 1, 2), None), Linear(out.T, bias))
    return model, lambda m: loss_of(jnp.swapaxes(m.layers.weight, 1, 2), m.out.weight.T, m.out.bias)


class NnxLayers(nnx.Module):
    def __init__(self, **values):
        for name, value in values.items():
            setattr(self, name, nnx.Param(value))


class NnxModel(nnx.Module):
    def __init__(self):
        layers, out, bias = arrays()
        self.layers, self.out = NnxLayers(kernel=layers), NnxLayers(kernel=out, bias=bias)

    def loss(self):
        return loss_of(self.layers.kernel[...], self.out.kernel[...], self.out.bias[...])


CONTAINERS = {"linen": linen, "boxed": boxed, "plain": plain, "haiku": haiku, "equinox": equinox}
