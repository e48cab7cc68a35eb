"""Activations in few bits: tokens rounded to a format, blocks of channels to two."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ...formats import Format
from ...formats.scales import split
from ..common.arguments import accumulator
from .inputs import MixedActivations, Spec, largest_whole


class Activations(NamedTuple):
    """Tokens as x = values * scales, with a scale for each token and block of channels."""

    values: Array  # [M, K]
    scales: Array | None  # [M, blocks]; None: x is not rounded
    block: int  # channels
    whole: bool = False  # values are whole numbers
    largest: int = 0  # their largest magnitude then


def quantize_activations(x: Array, spec: Spec) -> Activations:
    """Round each token of x [M, K] to the format that the call asks for."""
    dtype = accumulator(x.dtype)
    given = spec.activations
    if given is None:
        return Activations(x.astype(dtype), None, spec.K)
    if not isinstance(given, MixedActivations):
        block = min(given.group_size or spec.K, spec.K)
        return Activations(*_rounded(x, given, block, dtype), block, *_whole(given))
    first = min(given.high_blocks * given.block, spec.K)
    parts = [
        _rounded(part, format, given.block, dtype)
        for part, format in ((x[:, :first], given.high), (x[:, first:], given.low))
        if part.shape[1]
    ]
    values, scales = (jnp.concatenate(pair, axis=1) for pair in zip(*parts, strict=True))
    return Activations(values, scales, given.block, *_whole(given.high, given.low))


def _whole(*formats: Format) -> tuple[bool, int]:
    largest = [largest_whole(format) for format in formats]
    return None not in largest, max(n or 0 for n in largest)


def _rounded(x: Array, format: Format, block: int, dtype) -> tuple[Array, Array]:
    """Values [M, K], and the scales [M, blocks] that multiply them."""
    groups = split(x.astype(jnp.float32), block)
    scaling = format.fit(groups)
    values = format.element.decode(format.encode(groups, scaling))
    if scaling.zeros is not None:
        values = values - scaling.zeros.astype(jnp.float32)[..., None]
    values = values.reshape(x.shape[0], -1)[:, : x.shape[1]]
    return values.astype(dtype), format.scale(scaling).astype(dtype)


def each_segment(a: Array, size: int, segment: int, n: int) -> Array:
    """For n segments of rows of W each one's row of `a`, which has a row for every `size` of them."""
    if size <= segment:
        return a
    return jnp.repeat(a, size // segment, 0, total_repeat_length=a.shape[0] * (size // segment))[:n]
