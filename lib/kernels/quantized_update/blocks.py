"""One step on blocks that lie in fast memory: the arithmetic that every kernel shares."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from .inputs import Spec
from .rules import RULES

SMALLEST = 2.0**-126  # of float32's normal numbers: one over a smaller one may be infinite


def _of_rows(x: Array) -> Array:
    return jnp.max(x, axis=-1, keepdims=True)


def update_blocks(
    grad: Array,
    codes: Sequence[Array],
    scales: Sequence[Array],
    hyper: Sequence[Array],
    spec: Spec,
    *,
    largest: Callable[[Array], Array] = _of_rows,
    sqrt: Callable[[Array], Array] = jnp.sqrt,
) -> tuple[Array, list[Array], list[Array]]:
    """A step on groups [n, G] with scales [n, 1], or on one group [G] with scalar scales.

    Args:
      largest: how the maximum of each group is found.
      sqrt: where a kernel has its own.

    Returns:
      The update, codes and scales, shaped and typed like the arguments.
    """
    moments = tuple(
        f.decode(c.astype(jnp.int32)) * s for f, c, s in zip(spec.elements, codes, scales, strict=True)
    )
    update, moments = RULES[spec.rule].apply(grad.astype(jnp.float32), moments, hyper, sqrt)
    new_codes, new_scales = [], []
    for f, c, m in zip(spec.elements, codes, moments, strict=True):
        size = jnp.abs(m)
        # A maximum keeps or drops NaN, as the chip has it; and codes times an infinite scale are anything.
        scale = largest(jnp.where(size < jnp.inf, size, jnp.inf)) * (1 / f.largest)
        scale = jnp.where(scale < jnp.inf, scale, jnp.nan)
        unit = m * (1 / jnp.where(scale < SMALLEST, 1.0, scale))
        new_codes.append(f.encode(unit).astype(c.dtype))
        new_scales.append(scale)
    return update.astype(grad.dtype), new_codes, new_scales
