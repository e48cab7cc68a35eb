"""Stochastic rounding: weights in bfloat16 or 8 bits need no float32 copy to be right on average."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ...formats import QuantizedTensor, quantize


def apply_updates_stochastic(params: Any, updates: Any, key: Key[Array, ""]) -> Any:
    """`optax.apply_updates` with stochastic rounding: on average, no update is too small for the format.

    Args:
      params: a tree of floating arrays and `QuantizedTensor`s. bfloat16, float16 and quantized leaves are
        rounded at random; float32 and wider ones as ever.
      updates: like params, with an array for each quantized leaf; in float32 for leaves that are rounded, as
        optimizers make them of gradients in float32. Those of bfloat16 gradients are rounded before, to the
        nearest: a weight decay that is small beside the rest is lost in them.
      key: fresh at every step.

    Returns:
      New params, each leaf in its old format.

    Raises:
      ValueError: an update has another shape than its parameter, or is rounded already.

    Source: Zhang et al. 2024, Q-GaLore (arXiv 2407.08296): INT8 weights with stochastic rounding.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> w = jnp.ones(10_000, jnp.bfloat16)
        >>> new = frugax.optim.apply_updates_stochastic(w, jnp.full(10_000, 1e-3), jax.random.key(0))
        >>> new.dtype, bool(abs(new.astype(jnp.float32).mean() - 1.001) < 2e-4)  # bfloat16 has 1 and 1.0078
        (dtype(bfloat16), True)
    """
    is_leaf = lambda x: isinstance(x, QuantizedTensor)  # noqa: E731
    leaves = jax.tree.leaves(params, is_leaf=is_leaf)
    tree: Any = jax.tree.structure(params, is_leaf=is_leaf)
    new = []
    for i, (p, u) in enumerate(zip(leaves, tree.flatten_up_to(updates), strict=True)):
        if u.shape != p.shape:
            raise ValueError(
                f"updates: got {list(u.shape)} for a parameter {list(p.shape)}; expected the same shape"
            )
        exact = not is_leaf(p) and p.dtype.itemsize >= 4
        if u.dtype.itemsize < 4 and not exact:
            raise ValueError(
                f"updates: got {u.dtype}{list(u.shape)}, rounded to the nearest already; expected float32 "
                "(give the optimizer gradients in float32)"
            )
        new.append(_apply(p, u, jax.random.fold_in(key, i)))
    return tree.unflatten(new)


def _apply(p, u: Array, key):
    if isinstance(p, QuantizedTensor):
        how = dict(axis=p.axis, group_size=p.group_size, rounding="stochastic", key=key)
        return quantize(p.dequantize() + u, p.format, **how)
    if p.dtype in (jnp.bfloat16, jnp.float16):
        return round_stochastic(p.astype(jnp.float32) + u.astype(jnp.float32), p.dtype, key)
    return (p + u).astype(p.dtype)


def round_stochastic(x: Float[Array, "*s"], dtype, key: Key[Array, ""]) -> Float[Array, "*s"]:
    """Round x to one of its two neighbours in a narrower dtype, at random, so that the mean is x.

    Args:
      x: float32, finite.
      dtype: bfloat16 or float16.
      key: PRNG key.

    Raises:
      ValueError: another dtype.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = frugax.optim.round_stochastic(jnp.full(8, 1.001), jnp.bfloat16, jax.random.key(0))
        >>> set(x.tolist()) <= {1.0, 1.0078125}
        True
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"dtype: got {jnp.dtype(dtype)}; expected bfloat16 or float16")
    nearest = x.astype(dtype)
    value = nearest.astype(jnp.float32)
    towards = jnp.where(x > value, jnp.inf, -jnp.inf).astype(dtype)
    beside = jnp.nextafter(nearest, towards)
    gap = beside.astype(jnp.float32) - value
    inexact = (x != value) & jnp.isfinite(gap)
    away = jnp.where(inexact, (x - value) / jnp.where(inexact, gap, 1.0), 0.0)
    return jnp.where(jax.random.uniform(key, x.shape, jnp.float32) < away, beside, nearest)
