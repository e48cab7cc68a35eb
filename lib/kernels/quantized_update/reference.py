"""A step on quantized moments as the paper says it: look values up, update, look the nearest codes up."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from ...formats import Element
from ..common.arguments import accumulator
from .inputs import Inputs, Spec
from .rules import RULES


def forward(call: Inputs, spec: Spec) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """(update, codes, scales): like grad, and like each moment's."""
    dtype = accumulator(call.grad.dtype)
    shape = call.grad.shape
    C = shape[-1] if spec.ragged else shape[-1] * shape[-2]
    rows = lambda x: x.reshape(-1, C)  # noqa: E731
    group = np.arange(C) // spec.group_size
    moments = tuple(
        _table(f, dtype)[rows(c).astype(jnp.int32) - f.lowest] * s.reshape(rows(c).shape[0], -1)[:, group]
        for f, c, s in zip(spec.elements, call.codes, call.scales, strict=True)
    )
    update, moments = RULES[spec.rule].apply(rows(call.grad).astype(dtype), moments, tuple(call.hyper))
    codes, scales = [], []
    for f, m, old in zip(spec.elements, moments, call.scales, strict=True):
        largest = [jnp.max(jnp.abs(m[:, group == n]), axis=1) for n in range(group[-1] + 1)]
        scale = jnp.stack(largest, axis=1) / f.largest
        scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan)
        unit = m / jnp.where(scale == 0, 1, scale)[:, group]
        table = _table(f, dtype)
        code = jnp.searchsorted((table[1:] + table[:-1]) / 2, unit) + f.lowest
        codes.append(code.reshape(shape).astype(f.code_dtype))
        scales.append(scale.reshape(old.shape).astype(old.dtype))
    return update.reshape(shape).astype(call.grad.dtype), tuple(codes), tuple(scales)


def _table(element: Element, dtype) -> Array:
    return element.decode(jnp.arange(element.lowest, element.highest + 1)).astype(dtype)
