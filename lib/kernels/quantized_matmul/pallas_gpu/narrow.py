"""Activations in 8 bits on Hopper: codes of both sides are operands of one byte, W's from registers.

A signed code of b bits is moved to the top of its byte, where two's complement needs no sign to be spread:
the byte is the code times 2^(8 - b), which the scale takes back. Products of e4m3 are summed in some 14 bits
by the tensor cores (DeepSeek-V3, arXiv 2412.19437), so sums of a group or block are added up in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ....formats import Format
from ....formats.element import Element
from ....formats.integer import Integer
from ....formats.minifloat import Minifloat
from ....formats.packing import planes
from ....formats.scales import AbsMax
from ...common.hopper import F32, Tiles, along_rows
from ..activations import quantize_activations
from ..inputs import Inputs, Spec
from .registers import HALF, as_bytes, shifted
from .tiling import Tiling


def unsupported_reason(call: Inputs, spec: Spec) -> str | None:
    """Why these activations can't be multiplied by this W; None if they can."""
    given, element = spec.activations, spec.format.element
    if given is None:
        return None
    if not isinstance(given, Format) or type(given.scheme) is not AbsMax or given.group_size is not None:
        return "the GPU kernel takes activations in one format, with one scale for each token"
    if call.zeros is not None:
        return "the GPU kernel multiplies rounded activations by W without zeros"
    if _dtype(given.element) is None or _dtype(given.element) != _dtype(element):
        return (
            "the GPU kernel multiplies signed integers of both sides, or fp8_e4m3 of both, "
            f"not {given.element.name} by {element.name}"
        )
    return None


def _dtype(element: Element) -> Any:
    """The dtype of wgmma's operands that has the values; None if there is none."""
    if isinstance(element, Integer) and element.signed:
        return jnp.int8
    e4m3 = isinstance(element, Minifloat) and element.name == "fp8_e4m3"
    return jnp.float8_e4m3fn if e4m3 else None


def tokens(call: Inputs, spec: Spec) -> tuple[Array, Array | None]:
    """The tokens [M, K] as operands, and the scale of each, [M], if they are rounded."""
    if spec.activations is None:
        return call.x, None
    x = quantize_activations(call.x, spec)
    assert x.scales is not None
    return x.values.astype(_dtype(spec.format.element)), x.scales[:, 0].astype(F32)


def unit(element: Element) -> float:
    """The factor that turns a byte's value into the code's."""
    return 2.0 ** (element.bits - 8)


def add_block(
    words: Callable[[int, int], Array],
    channels: Any,
    scales: Callable[[int], tuple],
    sums: tuple[Array, ...],
    spec: Spec,
    sizes: Tiling,
    tiles: Tiles,
) -> tuple[Array, ...]:
    """Add the products of a block of W's rows to the sums of the even and of the odd columns.

    Args:
      words: `words(plane, byte)`, loaded by fours.
      channels: the tokens' tile in shared memory.
      scales: `scales(group)` of the block's groups.
      sums: int32 if they are whole ones, else float32, scaled.
      spec, sizes, tiles: of the program.
    """
    element, interpret = spec.format.element, tiles.interpret
    dtype = _dtype(element)
    total = jnp.int32 if dtype == jnp.int8 else F32

    @functools.cache
    def weights(first: int) -> tuple[Array, Array]:
        code = None
        for plane, (width, low) in enumerate(planes(element.bits)):
            run = sizes.block * width // 8
            place, to = first // run * width, low + 8 - element.bits
            part = shifted(words(plane, first % run), place - to, interpret=interpret)
            part = part & jnp.uint16((((1 << width) - 1) << to) * 0x0101)
            code = part if code is None else code | part
        assert code is not None
        return as_bytes(code, dtype, interpret=interpret)

    def pair(first: int, high: int) -> tuple[Array, Any]:
        return weights(first)[high], tiles.transposed(channels.at[:, pl.ds(first, sizes.chunk)])

    def multiply(chunks: range, accumulators) -> None:
        for k in chunks:
            for high in (0, 1):
                plgpu.wgmma(accumulators[high], *pair(k, high))
                plgpu.wgmma_wait(1)  # the operand before has left its registers

    def products(chunks: range, start: tuple[Array, ...]) -> tuple[Array, ...]:
        if interpret:
            parts = (
                [a.astype(total) @ b.astype(total) for a, b in (pair(k, h) for k in chunks)] for h in (0, 1)
            )
            return tuple(sum(part, y) for part, y in zip(parts, start, strict=True))
        found = pl.run_state(functools.partial(multiply, chunks))(tuple(map(plgpu.ACC.init, start)))
        return tuple(lax.optimization_barrier(tuple(found)))

    if sizes.whole_sums:
        return products(range(0, sizes.block, sizes.chunk), sums)
    size = sizes.block // sizes.groups
    for group in range(sizes.groups):
        for k in range(group * size, (group + 1) * size, sizes.chunk):
            weights(k)  # outside of what multiplies, since groups share bytes
        zeros = tuple(tiles.full((HALF, sizes.tokens), 0, total) for _ in range(2))
        parts = products(range(group * size, (group + 1) * size, sizes.chunk), zeros)
        wide = (along_rows(s * unit(element), (HALF, sizes.tokens)) for s in scales(group)[0])
        sums = tuple(y + part.astype(F32) * s for y, part, s in zip(sums, parts, wide, strict=True))
    return sums
