"""The product on TPU: which calls the kernels take, and their arrays around them.

Codes, scales and zeros cross HBM as they are stored, once for every 256 tokens. Groups are scaled after their
product. Groups of less than 128 rows, the depth of the matrix unit, are so for few tokens alone: x has a copy
for each group of a tile then, with zeros for the others. For many tokens and the gradient W is scaled before.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ....formats import Format, Mixture, Pairs
from ....formats.element import Dependent
from ....formats.packing import BLOCK, pack, unpack
from ...common.arguments import pad_to, trim
from ...common.chips import VMEM_LIMIT
from ...common.tiling import round_up
from ...common.tpu import F32, Launch
from ..activations import quantize_activations
from ..decode import block_of, unpack_rows
from ..inputs import Inputs, Spec, largest_whole
from ..tiling import TPUTiling, for_tpu
from .kernels import Kind, Product, backward_kernel, forward_kernel, terms
from .tiles import BF16, TILE, Tiles, element_of, elements_of, even_first, exact, is_fp4_e2m1, line, split

MANY = 128  # rows of x and its copies: if there are more, their product takes longer than decoding W
LEAST_GROUP = 4  # rows that share a scale: those that the bytes of a word come from
ROWS = 16  # groups are padded to a multiple of the rows of a bfloat16 register


def unsupported_reason(call: Inputs, spec: Spec) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    if call.x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel reads float32 and bfloat16, not {call.x.dtype}"
    if spec.method != "dot":
        return f"the TPU kernel multiplies values, and has no method {spec.method!r}"
    if not (spec.format.elementwise or isinstance(spec.format, Mixture | Pairs)):
        return f"the TPU kernel decodes code by code, and a code of {spec.format.name} has no value alone"
    if isinstance(spec.format, Mixture) and len({e.base for e in spec.format.elements}) > 1:
        return f"the TPU kernel has one table for all groups but for a value, and {spec.format.name} several"
    if len(getattr(spec.format.element, "values", ())) > 16:
        return f"the TPU kernel computes values, and {spec.format.name} looks them up in a long table"
    if spec.group_size < spec.K and _together(spec.group_size) < LEAST_GROUP:
        return f"the TPU kernel takes groups of a multiple of {LEAST_GROUP} rows, not {spec.group_size}"
    if any(_launch_sizes(call, spec, backward) is None for backward in (False, True)):
        return f"K={spec.K}: the smallest blocks would take more than {VMEM_LIMIT >> 20} MiB of VMEM"
    return None


def forward(call: Inputs, spec: Spec, *, interpret: bool) -> Array:
    """x W + b [M, N] in x's dtype."""
    return forward_tiled(call, spec, _launch_sizes(call, spec, False), interpret=interpret)


def backward(call: Inputs, cotangent: Array, spec: Spec, *, interpret: bool) -> Inputs:
    """The gradients of x and bias; W is a constant."""
    nothing = (
        jnp.zeros_like(x) if x is not None and jnp.issubdtype(x.dtype, jnp.floating) else None for x in call
    )
    dx = backward_tiled(call, cotangent, spec, _launch_sizes(call, spec, True), interpret=interpret)
    dbias = None if call.bias is None else cotangent.astype(F32).sum(0).astype(call.bias.dtype)
    return Inputs(*nothing)._replace(x=dx, bias=dbias)


def forward_tiled(call: Inputs, spec: Spec, tiling: TPUTiling, *, interpret: bool) -> Array:
    """`forward` with blocks of one's choice."""
    size, t, wide = sizes_of(call, spec), tiling, call.x.dtype == F32
    p = _product(size, spec, t, _kind(call, spec, size), _parts_of(call, spec), wide, interpret)
    x, scales = call.x, None
    if spec.activations is not None:
        rounded = quantize_activations(call.x, spec)
        x, scales = rounded.values, rounded.scales
        if not _one_scale(spec):
            x, scales = x * jnp.repeat(scales, rounded.block, 1)[:, : spec.K], None  # float32
    x = pad_to(x, (size.M, size.K))
    corrected = p.kind is not Kind.SCALED and (p.base != 0 or call.zeros is not None)

    steps = (pl.cdiv(size.M, t.tokens), pl.cdiv(size.N, t.columns), size.K // t.depth)
    semantics = ("parallel", "parallel", "arbitrary")
    launch = Launch("quantized_matmul", steps, semantics, interpret=interpret, vmem_limit=VMEM_LIMIT)
    evens = p.kind in (Kind.COUNTED, Kind.FOURFOLD, Kind.LOOKED_UP)
    operand = x.astype(jnp.int8)[None] if p.kind is Kind.WHOLE else _in_parts(x, p.parts)
    operand = even_first(operand) if evens else operand
    if p.apart > 1:
        operand = _apart(operand, p.apart, TILE // 2 if evens else TILE)
    block = pl.BlockSpec((p.parts * p.apart, t.tokens, t.depth), lambda m, n, k: (0, m, k))
    launch.add("x", operand, block)
    groups = round_up(size.groups, ROWS) if corrected else size.groups
    _read(launch, call, spec, size, t, p, groups, lambda n, k: (k, n))
    if corrected:
        sums = split(x.astype(F32).reshape(size.M, size.groups, -1).sum(-1), p.order)
        sums = [pad_to(sums[i], (size.M, groups)).astype(BF16) for i, _ in terms(p.order)]
        block = pl.BlockSpec((t.tokens, groups * len(sums)), lambda m, n, k: (m, 0))
        launch.add("sums", jnp.concatenate(sums, 1), block)
    if scales is not None:
        block = pl.BlockSpec((t.tokens, 1), lambda m, n, k: (m, 0))
        launch.add("tokens", pad_to(scales, (size.M, 1)), block)
    if call.bias is not None:
        launch.add("bias", call.bias.astype(F32)[None], pl.BlockSpec((1, t.columns), lambda m, n, k: (0, n)))
    tile = pl.BlockSpec((t.tokens, t.columns), lambda m, n, k: (m, n))
    launch.write("y", (size.M, size.N), call.x.dtype, tile)
    launch.hold("sum", (t.tokens, t.columns))
    return trim(launch.run(partial(forward_kernel, p))["y"], (call.x.shape[0], size.N))


def backward_tiled(
    call: Inputs, cotangent: Array, spec: Spec, tiling: TPUTiling, *, interpret: bool
) -> Array:
    """dy W^T [M, K], with blocks of one's choice."""
    size, t, wide = sizes_of(call, spec), tiling, call.x.dtype == F32
    steps = (pl.cdiv(size.M, t.tokens), pl.cdiv(size.N, t.columns))
    p = _product(size, spec, t, Kind.SCALED, 3 if wide else 1, wide, interpret, steps=steps[1])
    semantics, name = ("parallel", "arbitrary"), "quantized_matmul_backward"
    launch = Launch(name, steps, semantics, interpret=interpret, vmem_limit=VMEM_LIMIT)
    dy = _in_parts(pad_to(cotangent, (size.M, steps[1] * t.columns)), p.parts)
    launch.add("dy", dy, pl.BlockSpec((p.parts, t.tokens, t.columns), lambda m, n: (0, m, n)))
    _read(launch, call, spec, size, t, p, size.groups, lambda n: (0, n))
    whole = pl.BlockSpec((t.tokens, size.K), lambda m, n: (m, 0))
    launch.write("dx", (size.M, size.K), call.x.dtype, whole)
    launch.hold("sum", (t.tokens, size.K))
    return trim(launch.run(partial(backward_kernel, p))["dx"], call.x.shape)


class Sizes(NamedTuple):
    """A call as the kernels see it: M, K and groups padded."""

    M: int
    K: int
    N: int
    block: int  # codes that are packed together
    group: int  # rows of W that share a scale
    groups: int


def sizes_of(call: Inputs, spec: Spec) -> Sizes:
    bits, packed = spec.format.bits, call.codes.shape[0]
    block, K = block_of(spec, packed), packed * 8 // bits
    if bits == 8:
        K = round_up(K, TILE)
        block = math.gcd(K, BLOCK)
    elif not (block == BLOCK or (block == TILE and bits % 2 == 0)):  # else a plane fills no registers
        K, block = round_up(spec.K, BLOCK), BLOCK
    group = K if spec.group_size >= spec.K else _together(spec.group_size)
    M = round_up(call.x.shape[0], 16 if call.x.dtype == F32 else 8)
    return Sizes(M, K, call.codes.shape[1], block, group, -(-K // group))


def _together(group_size: int) -> int:
    """The rows that a kernel scales together: a group, or what of it fits evenly into tiles."""
    return group_size if group_size % TILE == 0 else math.gcd(group_size, TILE)


def _launch_sizes(call: Inputs, spec: Spec, backward: bool) -> TPUTiling | None:
    size, bits = sizes_of(call, spec), spec.format.bits
    parts = _parts_of(call, spec) if not backward else 3 if call.x.dtype == F32 else 1
    if not backward and _kind(call, spec, size) is not Kind.SCALED:
        parts *= max(TILE // size.group, 1)
    return for_tpu(
        size.M, size.K, size.N, block=size.block, bits=bits, groups=size.groups, parts=parts, whole=backward
    )


def _one_scale(spec: Spec) -> bool:
    """Each token has one scale for all of its channels."""
    given = spec.activations
    return isinstance(given, Format) and (given.group_size or spec.K) >= spec.K


def _parts_of(call: Inputs, spec: Spec) -> int:
    """The bfloat16 arrays that x is split in."""
    wide = call.x.dtype == F32
    if spec.activations is None:
        return 3 if wide else 1
    return 1 if _one_scale(spec) and exact(spec.activations.element) else 2 + wide


def _kind(call: Inputs, spec: Spec, size: Sizes) -> Kind:
    element, bits = element_of(spec.format), spec.format.bits
    mixture = isinstance(spec.format, Mixture)
    linear, small = line(element), size.group < TILE
    many = size.M * _parts_of(call, spec) * max(TILE // size.group, 1) > MANY
    if many and small:
        return Kind.SCALED
    whole = _one_scale(spec) and (largest_whole(spec.activations) or 128) < 128
    if whole and linear is not None and not small:
        return Kind.WHOLE
    if is_fp4_e2m1(element) and not many and not mixture:
        return Kind.FOURFOLD
    # Of float32 x more digits are wanted than a bfloat16 number has, or than are left where the sum of x,
    # many times over, is taken off.
    if many or call.x.dtype == F32 or bits > 7:
        return Kind.VALUES
    if linear is not None:
        return Kind.COUNTED
    table = bits <= 4 and not isinstance(element, Dependent) and not (mixture and small)
    return Kind.LOOKED_UP if table else Kind.VALUES


def _product(
    size: Sizes, spec: Spec, t: TPUTiling, kind: Kind, parts: int, wide: bool, interpret: bool, steps=None
) -> Product:
    inexact = kind is Kind.SCALED or not all(map(exact, elements_of(spec.format)))
    tiles = Tiles(spec.format, size.block, size.group, 3 if inexact and wide else 1, interpret)
    steps = steps or size.K // t.depth
    return Product(
        tiles,
        kind,
        parts,
        2 + wide,
        blocks=t.depth // size.block,
        steps=steps,
        columns=size.N,
        wide=t.columns,
    )


def _in_parts(x: Array, parts: int) -> Array:
    """Bfloat16 arrays [parts, ...] that add up to x."""
    if parts == 1:
        return x.astype(BF16)[None]
    return jnp.stack([part.astype(BF16) for part in split(x.astype(F32), parts)])


def _apart(x: Array, groups: int, run: int) -> Array:
    """Copies [parts * groups, M, K] of x [parts, M, K], each with one group's channels of every `run`."""
    parts, M, K = x.shape
    group = (np.arange(K) % run) // (run // groups)  # of each channel
    keep = group == np.arange(groups)[:, None]
    return jnp.where(keep[None, :, None], x[:, None], 0).reshape(parts * groups, M, K)


def _read(
    launch: Launch,
    call: Inputs,
    spec: Spec,
    size: Sizes,
    t: TPUTiling,
    p: Product,
    groups: int,
    at: Callable[..., tuple[Any, Any]],
) -> None:
    """Add W's arrays, and scratch for what they decode to; `at` gives the place of a block of codes."""
    arrays = arranged(call, spec, size, groups)
    rows = t.depth * spec.format.bits // 8
    launch.add("codes", arrays["codes"], pl.BlockSpec((rows, t.columns), lambda m, *place: at(*place)))
    strip = pl.BlockSpec((groups, t.columns), lambda m, n, *k: (0, n))
    for name in ("scales", "zeros", "choices"):
        if name in arrays:
            launch.add(name, arrays[name], strip)
            if name != "zeros" or p.kind is Kind.SCALED:
                launch.hold(name.removesuffix("s"), (groups, t.columns))
    for name in ("outer", "offset"):
        if name in arrays:
            launch.add(name, arrays[name], pl.BlockSpec(memory_space=pltpu.SMEM))


def arranged(call: Inputs, spec: Spec, size: Sizes, groups: int) -> dict[str, Array]:
    """W's arrays by name as the kernels read them: whole packing blocks, and so many groups of rows."""
    codes, bits = call.codes, spec.format.bits
    if bits == 8:
        codes = pad_to(codes, (size.K, size.N))
    elif block_of(spec, codes.shape[0]) != size.block:  # odd sizes are packed anew
        codes = pad_to(unpack_rows(codes, spec.format, block_of(spec, codes.shape[0])), (size.K, size.N))
        codes = pack(codes.T, bits).T
    found = {"codes": codes}
    # Choices of four groups are in a byte: each gets one of its own here.
    choices = None if call.choices is None else unpack(call.choices.T, 2, signed=False).T.astype(jnp.uint8)
    for name, x in (("scales", call.scales), ("zeros", call.zeros), ("choices", choices)):
        if x is not None:
            if size.group < spec.group_size < spec.K:
                x = jnp.repeat(x, spec.group_size // size.group, 0)
            found[name] = pad_to(x[:groups], (groups, size.N))
    for name in ("outer", "offset"):
        x = getattr(call, name)
        if x is not None:
            found[name] = x.reshape(1, 1)
    return found
