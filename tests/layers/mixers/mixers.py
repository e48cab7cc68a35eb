"""Every sequence mixer in the sizes that its tests use, and what they compile once for all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax

from ..calls import Calls

WIDTH, TIME = 8, 7  # of the calls that are compiled

MIXERS = {
    "LinearAttention-elu+1": ("LinearAttention", {"heads": 2, "key_size": 5}),
    "LinearAttention-taylor": ("LinearAttention", {"heads": 2, "feature_map": "taylor", "key_size": 3}),
    "LinearAttention-learned": ("LinearAttention", {"heads": 2, "feature_map": "learned"}),
    "LinearAttention-sum": ("LinearAttention", {"heads": 2, "normalize": False}),
    "LightningAttention": ("LightningAttention", {"heads": 2}),
    "LightningAttention-lrpe": ("LightningAttention", {"heads": 2, "lrpe": True}),
    "Retention": ("Retention", {"heads": 2}),
    "GatedLinearAttention": ("GatedLinearAttention", {"heads": 2, "gate_rank": 3}),
    "GatedLinearAttention-conv": ("GatedLinearAttention", {"heads": 2, "gate_rank": 3, "conv_width": 4}),
    "HGRN2": ("HGRN2", {"heads": 2}),
    "RWKV5": ("RWKV5", {"heads": 2}),
    "RWKVChannel": ("RWKVChannel", {"expand": 1.5}),
    "RWKV6": ("RWKV6", {"heads": 2, "mix_rank": 3, "decay_rank": 5}),
    "MLGRU": ("MLGRU", {}),
    "MLGRU-ternary": ("MLGRU", {"ternary": True}),
    "FlashRNN-lstm": ("FlashRNN", {"heads": 2}),
    "FlashRNN-gru": ("FlashRNN", {"heads": 2, "cell": "gru"}),
    "FlashRNN-elman": ("FlashRNN", {"heads": 1, "cell": "elman", "normalize": False}),
    "FlashRNN-slstm": ("FlashRNN", {"heads": 2, "cell": "slstm"}),
    "LMU": ("LMU", {"order": 5, "theta": 6.0, "signals": 2}),
    "Mamba": ("Mamba", {"state_size": 3, "dt_rank": 2}),
    "Mamba-norms": ("Mamba", {"state_size": 3, "expand": 1.5, "inner_norm": 1e-6}),
    "Mamba-constant": ("Mamba", {"state_size": 3, "selective": False}),
    "Mamba2": ("Mamba2", {"heads": 4, "groups": 2, "state_size": 3}),
    "SlidingWindowAttention": ("SlidingWindowAttention", {"heads": 2, "window": 4}),
    "SlidingWindowAttention-long": ("SlidingWindowAttention", {"heads": 2, "window": 20}),
    "GatedConvolution": ("GatedConvolution", {"width": 3}),
    "Based": ("Based", {"heads": 2, "key_size": 3, "window": 4}),
}

# Parameters that another entry of their class stands for in packing and precision, but in the full tier.
VARIANTS = {
    "LinearAttention-taylor",
    "LinearAttention-learned",
    "LinearAttention-sum",
    "FlashRNN-gru",
    "FlashRNN-elman",
    "Mamba-norms",
    "Mamba-constant",
    "SlidingWindowAttention-long",
}


def together(*, full=()):
    """Parametrize a test by mixer; one worker runs a mixer's tests, and compiles its calls once for them."""

    def marks(name):
        return [pytest.mark.xdist_group(f"mixer {name}"), *([pytest.mark.full] if name in full else [])]

    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in MIXERS])


def make(name, *, batch=2, time=TIME, dtype=jnp.float64, **more):
    """(module, variables, x), with parameters far from zeros and ones, so that each of them matters."""
    class_name, arguments = MIXERS[name]
    module = getattr(frugax.layers, class_name)(**arguments, param_dtype=dtype, **more)
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.standard_normal((batch, time, WIDTH)).astype(dtype))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    draw = lambda p: jax.device_put((0.3 * rng.standard_normal(p.shape)).astype(p.dtype))  # noqa: E731
    return module, jax.tree.map(draw, shapes), x


@functools.cache
def calls(name):
    """The compiled calls of a mixer, for all tests of the process. Used under jax.enable_x64(True)."""
    module, variables, x = make(name, time=3 + TIME)
    # The first document of each row goes on with that of the 3 tokens before the call.
    ids = jnp.array([[7, 7, 2, 7, 7, 7, 7], [0, 0, 0, 0, 0, 1, 1]])
    return Calls(module.apply, variables, x, ids)


@functools.cache
def whole(name):
    """(the parameters, x, y, the state) of a call without a state in float64, as numpy arrays."""
    with jax.enable_x64(True):
        mine = calls(name)
        x = mine.x[:, 3:]
        (y, state), _ = mine.whole(x)
        return jax.tree.map(np.asarray, (mine.variables["params"], x, y, state))
