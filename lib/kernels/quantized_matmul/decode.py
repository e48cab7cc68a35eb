"""Codes of W back to values, rows of W along the first axis as they are stored."""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ...formats import Format
from ...formats.minmax import MinMax
from ...formats.packing import block_size, planes
from ...formats.scales import AbsMax, Scaling
from .inputs import Inputs, Spec, weights


class Groups(NamedTuple):
    """The decoded parameters of each group: [G, N] each, None where the format has none."""

    scales: Array  # float32; of two ends a group, as they are stored
    zeros: Array | None  # float32
    choices: Array | None


def groups(call: Inputs, spec: Spec) -> Groups:
    """Decode the scales and zeros of all groups."""
    scaling = weights(call, spec).scaling()
    if isinstance(spec.format.scheme, MinMax):  # a scale alone would lose the ends
        return Groups(call.scales, None, None)
    scales = jnp.broadcast_to(spec.format.scale(scaling).T, call.scales.shape)
    choices = None if scaling.choices is None else scaling.choices.T
    return Groups(scales, None if call.zeros is None else call.zeros.astype(jnp.float32), choices)


def unpack_rows(packed: Array, format: Format, block: int) -> Array:
    """Codes int32 [n, N] of packed rows [n * bits / 8, N] that are whole blocks of `block` codes."""
    if format.bits == 8:
        return packed.astype(jnp.int32)
    N = packed.shape[1]
    packed, parts, byte = packed.reshape(-1, block * format.bits // 8, N), [], 0
    for width, low in planes(format.bits):
        count = block * width // 8
        shifts = np.arange(0, 8, width, dtype=np.uint8)[None, :, None, None]
        part = (packed[:, None, byte : byte + count] >> shifts) & np.uint8((1 << width) - 1)
        parts.append(part.reshape(-1, N) << low)
        byte += count
    codes = functools.reduce(jnp.bitwise_or, parts).astype(jnp.int32)
    sign = 1 << (format.bits - 1)
    return (codes ^ sign) - sign if format.element.lowest < 0 else codes


def values(codes: Array, groups: Groups, format: Format) -> tuple[Array, Array]:
    """The values of codes [G, g, N], less zeros, and the scales [G, N] that still multiply it."""
    if format.elementwise:
        value = format.element.decode(codes)
        return value if groups.zeros is None else value - groups.zeros[:, None], groups.scales
    ends = isinstance(format.scheme, MinMax)
    plain = format if ends else dataclasses.replace(format, scheme=AbsMax())
    scaling = Scaling(*(x if x is None else x.T for x in groups))
    whole = plain.decode(jnp.moveaxis(codes, 2, 0), scaling)  # [N, G, g]
    return jnp.moveaxis(whole, 0, 2), jnp.ones(groups.scales.shape, jnp.float32)


def block_of(spec: Spec, packed: int) -> int:
    """The codes that are packed together in W, which has so many rows of bytes."""
    bits = spec.format.bits
    return 1 if bits == 8 else block_size(packed * 8 // bits, bits)
