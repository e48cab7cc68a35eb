"""Codes in registers become values: a few operations on two codes at once where a format allows it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ....formats import Scaling
from ....formats.element import Element
from ....formats.integer import Integer
from ....formats.packing import planes
from ...common.hopper import F32, along_rows
from ..inputs import Spec
from .registers import shifted

# Bits of a power of two: with a code in the lowest bits of the mantissa it is 2^7 + code, or 2^10 + code.
_BIASED = {jnp.dtype(jnp.bfloat16): (0x4300, 7), jnp.dtype(jnp.float16): (0x6400, 10)}


def take(
    words: Callable[[int, int], Array], bits: int, block: int, first: int, high: int, *, interpret: bool
) -> Array:
    """Codes as uint16 [HALF, many], in the lowest `bits` with zeros above.

    Args:
      words: `words(plane, byte)`: as many words of a plane of a block of codes from a byte on.
      bits: of a code.
      block: codes of the block.
      first: of the codes to take: in each plane they lie in consecutive bytes, at the same place.
      high: 1 for the words' high bytes, 0 for their low ones.
      interpret: whether the kernel runs on CPU.
    """
    code = None
    for plane, (width, low) in enumerate(planes(bits)):
        byte, place = first % (block * width // 8), first // (block * width // 8) * width
        part = shifted(words(plane, byte), 8 * high + place - low, interpret=interpret)
        part = part & jnp.uint16(((1 << width) - 1) << low)
        code = part if code is None else code | part
    assert code is not None
    return code


def table(element: Element, dtype) -> np.ndarray | None:
    """The values of a format's codes in `dtype`, if they are looked up, else None."""
    if element.bits != 4 or isinstance(element, Integer):
        return None
    with jax.ensure_compile_time_eval():
        values = np.asarray(element.decode(jnp.arange(16, dtype=jnp.int32)))
    return values.astype(dtype)


def values(codes: Array, element: Element, dtype) -> Array:
    """The codes' values: exact in `dtype` where that takes two operations, else float32."""
    if not _is_quick(element, dtype):
        wide = codes.astype(jnp.int32)
        if element.lowest < 0:  # two's complement
            wide = jnp.where(wide >= 1 << (element.bits - 1), wide - (1 << element.bits), wide)
        return element.decode(wide)
    one, mantissa = _BIASED[jnp.dtype(dtype)]
    as_float = lambda x: lax.bitcast_convert_type(jnp.uint16(x), dtype)  # noqa: E731
    if not element.signed:
        return as_float(codes | one) - as_float(one)
    sign = 1 << (element.bits - 1)
    if element.bits <= mantissa:  # two's complement with its sign flipped is the value plus 2^(bits - 1)
        return as_float(codes ^ (one | sign)) - as_float(one | sign)
    return as_float((codes & (sign - 1)) | one) - as_float((codes & sign) | one)


def _is_quick(element: Element, dtype) -> bool:
    """Say if a code fits into the mantissa: 2^7 + 255 has no bfloat16."""
    mantissa = _BIASED[jnp.dtype(dtype)][1]
    return isinstance(element, Integer) and element.bits - element.signed <= mantissa


def scale(stored: Array, spec: Spec, given: dict) -> Array:
    """The float32 scales that are stored; `given` has what coded ones are multiplied by, and an offset."""
    if "outer" not in given:
        return spec.format.scale(Scaling(stored))
    value = spec.format.scheme.element.decode(stored.astype(jnp.int32)) * given["outer"][0]
    return value + given["offset"][0] if "offset" in given else value


def scaled(value: Array, scale: Array, zero: Array | None, dtype) -> Array:
    """(value - zero) * scale in `dtype`; scale and zero float32 like value, or [HALF] in layout ROWS."""
    if value.dtype == jnp.float16:  # too narrow for scales
        value = value.astype(F32)

    def wide(x: Array) -> Array:
        x = x.astype(value.dtype)
        return x if x.ndim == 2 else along_rows(x, value.shape)

    if zero is not None:
        value = value - wide(zero)
    return (value * wide(scale)).astype(dtype)
