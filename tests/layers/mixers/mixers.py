"""Every sequence mixer in the sizes that its tests use: odd where nothing has to divide."""

import jax
import jax.numpy as jnp
import numpy as np

import frugax

WIDTH = 12

MIXERS = {
    "LinearAttention-elu+1": ("LinearAttention", {"heads": 2, "key_size": 5}),
    "LinearAttention-taylor": ("LinearAttention", {"heads": 2, "feature_map": "taylor", "key_size": 3}),
    "LinearAttention-learned": ("LinearAttention", {"heads": 2, "feature_map": "learned"}),
    "LinearAttention-sum": ("LinearAttention", {"heads": 2, "normalize": False}),
    "LightningAttention": ("LightningAttention", {"heads": 3}),
    "LightningAttention-lrpe": ("LightningAttention", {"heads": 2, "lrpe": True}),
    "Retention": ("Retention", {"heads": 3}),
    "GatedLinearAttention": ("GatedLinearAttention", {"heads": 2, "gate_rank": 3}),
    "GatedLinearAttention-conv": ("GatedLinearAttention", {"heads": 2, "gate_rank": 3, "conv_width": 4}),
    "HGRN2": ("HGRN2", {"heads": 3}),
    "RWKV6": ("RWKV6", {"heads": 2, "mix_rank": 3, "decay_rank": 5}),
    "MLGRU": ("MLGRU", {}),
    "FlashRNN-lstm": ("FlashRNN", {"heads": 2}),
    "FlashRNN-gru": ("FlashRNN", {"heads": 3, "cell": "gru"}),
    "FlashRNN-elman": ("FlashRNN", {"heads": 1, "cell": "elman", "normalize": False}),
    "FlashRNN-slstm": ("FlashRNN", {"heads": 2, "cell": "slstm"}),
    "LMU": ("LMU", {"order": 5, "theta": 6.0, "signals": 2}),
    "Mamba": ("Mamba", {"state_size": 3, "dt_rank": 2}),
    "Mamba-norms": ("Mamba", {"state_size": 3, "expand": 1.5, "inner_norm": 1e-6}),
    "Mamba-constant": ("Mamba", {"state_size": 3, "selective": False}),
    "Mamba2": ("Mamba2", {"heads": 4, "groups": 2, "state_size": 3}),
    "SlidingWindowAttention": ("SlidingWindowAttention", {"heads": 2, "window": 4}),
    "SlidingWindowAttention-long": ("SlidingWindowAttention", {"heads": 3, "window": 20}),
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


def make(name, *, batch=2, time=13, dtype=jnp.float64, **more):
    """(module, variables, x), with parameters far from zeros and ones, so that each of them matters."""
    class_name, arguments = MIXERS[name]
    module = getattr(frugax.layers, class_name)(**arguments, param_dtype=dtype, **more)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, time, WIDTH)), dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return module, jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), shapes), x
