"""The portable form, which CPU gets: a block of W's rows at a time is decoded and multiplied.

No more of W than a block is ever in float32: it is still in the cache when it is multiplied. One or a few
tokens have a form of their own (`streamed`), in which nothing decoded is written to memory at all.
"""

import functools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..common.arguments import accumulator, pad_to
from . import lut, planes, streamed
from .activations import Activations, each_segment, quantize_activations
from .decode import Groups, block_of, groups, unpack_rows, values
from .inputs import Inputs, Spec, largest_whole

DECODED = 2**20  # elements of W that are decoded at a time
WRITTEN_OUT = 8  # segments of a block; XLA on CPU sums more of them, but slowly
EXACT = 2**24  # whole numbers below are exact in float32


def forward(call: Inputs, spec: Spec) -> Array:
    """x W + b [M, N] in x's dtype."""
    y = _product(spec, call.x, call._replace(x=None, bias=None))
    if call.bias is not None:
        y += call.bias.astype(y.dtype)[None]
    return y.astype(call.x.dtype)


def backward(call: Inputs, cotangent: Array, spec: Spec) -> Inputs:
    """The gradients of x and bias; W is a constant."""
    dtype = accumulator(call.x.dtype)
    dy = cotangent.astype(dtype)
    dx = _transposed(call, spec, dy).astype(call.x.dtype)
    nothing = (
        jnp.zeros_like(x) if x is not None and jnp.issubdtype(x.dtype, jnp.floating) else None for x in call
    )
    dbias = None if call.bias is None else dy.sum(0).astype(call.bias.dtype)
    return Inputs(*nothing)._replace(x=dx, bias=dbias)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(spec: Spec, x: Array, rest: Inputs) -> Array:
    """x W [M, N] in the accumulator's dtype."""
    call = rest._replace(x=x)
    if spec.method == "planes":
        return planes.product(call, spec)
    if spec.method != "dot":
        return lut.product(call, spec)
    if streamed.serves(call, spec):
        return streamed.product(call, spec)
    return _by_blocks(call, spec, quantize_activations(x, spec))


@_product.defjvp
def _tangent(spec, primals, tangents):
    x, rest = primals
    linear = spec._replace(activations=None, method="dot")  # rounding passes gradients straight
    dx = tangents[0]
    dy = _by_blocks(rest._replace(x=dx), linear, quantize_activations(dx, linear), differentiable=True)
    return _product(spec, x, rest), dy


class _Block(NamedTuple):
    """Rows of W, in segments of rows that share all their scales."""

    codes: Array  # packed
    groups: Groups  # those that the rows belong to
    at: Array | int  # how many blocks are before
    size: int  # rows of each of those
    rows: int  # of this one; the last may be padding
    real: int  # of those that are not padding
    packing: int  # codes that are packed together


def _by_blocks(call: Inputs, spec: Spec, x: Activations, *, differentiable: bool = False) -> Array:
    """x W, by a loop over blocks of rows."""
    K, N = spec.K, call.codes.shape[1]
    rows = _rows(spec, call.codes.shape[0], N, x.block)
    stored = groups(call, spec)
    channels = pad_to(x.values, (x.values.shape[0], call.codes.shape[0] * 8 // spec.format.bits))

    def add(y: Array, block: _Block) -> Array:
        mine = lax.dynamic_slice_in_dim(channels, block.at * rows, block.rows, 1)[:, : block.real]
        return y + _block_product(mine, block, spec, x)

    def step(y, i):
        return add(y, _block(call, spec, stored, i, rows)), None

    def copied(carry, i):
        y, codes = carry
        y = add(y, _block(call, spec, stored, i, rows)._replace(codes=codes))
        return (y, _codes(call, spec, i + 1, rows)), None

    y = jnp.zeros((x.values.shape[0], N), x.values.dtype)
    whole = K // rows
    numbers = jnp.arange(whole, dtype=jnp.uint32)
    if whole > 1 and differentiable:  # what is decoded is decoded again for the gradient
        y, _ = lax.scan(jax.checkpoint(step, prevent_cse=False), y, numbers)
    elif whole > 1:
        (y, _), _ = lax.scan(copied, (y, _codes(call, spec, 0, rows)), numbers)
    else:
        whole = 0
    if whole * rows < K:
        rest = jax.checkpoint(lambda y: add(y, _block(call, spec, stored, whole, rows, last=True)))
        y = rest(y)
    return y


def _rows(spec: Spec, packed: int, N: int, channels: int) -> int:
    """The rows of a block: whole blocks of packed codes, and whole groups or parts of one; else K."""
    if spec.K * N <= DECODED:
        return spec.K
    packing = block_of(spec, packed)
    shared = [size for size in (spec.group_size, channels) if size < spec.K]
    multiples = (n * 2**i for n in (packing, math.lcm(packing, *shared)) for i in range(24))
    fitting = [n for n in multiples if n < spec.K and all(n % s == 0 or s % n == 0 for s in shared)]
    return max((n for n in fitting if n * N <= DECODED), default=min(fitting, default=spec.K))


def _block(call: Inputs, spec: Spec, stored: Groups, i, rows: int, *, last: bool = False) -> _Block:
    """Slice the i-th block of `rows`; the last has all that is left."""
    bits, g = spec.format.bits, spec.group_size
    total = call.codes.shape[0] * 8 // bits
    padded = total - i * rows if last else rows
    count = spec.K - i * rows if last else rows
    codes = _codes(call, spec, i, rows, padded)
    first, n = _index(i, rows, g), -(-count // g)
    own = (a if a is None else lax.dynamic_slice_in_dim(a, first, n, 0) for a in stored)
    return _Block(codes, Groups(*own), i, rows, padded, count, block_of(spec, call.codes.shape[0]))


def _codes(call: Inputs, spec: Spec, i, rows: int, count: int | None = None) -> Array:
    """The packed codes of the i-th block of `rows`.

    A loop had better carry the next block's: XLA on CPU fuses a slice into what reads it, and then reads two
    planes of one a number at a time.
    """
    bits = spec.format.bits
    return lax.dynamic_slice_in_dim(call.codes, i * (rows * bits // 8), (count or rows) * bits // 8, 0)


def _index(i, rows: int, size: int):
    """Which group of `size` rows the i-th block of `rows` begins in."""
    return i * (rows // size) if rows % size == 0 else i // -(-size // rows)


def _block_product(x: Array, block: _Block, spec: Spec, activations: Activations) -> Array:
    """Multiply channels x [M, count] by a block of W."""
    M, N, dtype = x.shape[0], block.codes.shape[1], x.dtype
    codes = unpack_rows(block.codes, spec.format, block.packing)[: block.real]
    g, b = (min(size, block.real) for size in (spec.group_size, activations.block))
    segment = min(g, b)
    n = -(-block.real // segment)
    codes = pad_to(codes, (n * segment, N)).reshape(n, segment, N)
    own = Groups(*(a if a is None else each_segment(a, g, segment, n) for a in block.groups))
    w, scales = values(codes, own, spec.format)
    w, scales = w.astype(dtype), scales.astype(dtype)
    x = pad_to(x, (M, n * segment))
    if activations.scales is None:
        return jnp.matmul(x, (w * scales[:, None]).reshape(-1, N), precision="highest")
    first = _index(block.at, block.size, activations.block)
    token_scales = lax.dynamic_slice_in_dim(activations.scales, first, -(-block.real // b), 1)
    token_scales = each_segment(token_scales.T, b, segment, n)
    largest = largest_whole(spec.format) if activations.whole else None
    product = partial(_segment_sums, largest=largest and largest * activations.largest)
    segments = jnp.swapaxes(x.reshape(M, n, segment), 0, 1), w, token_scales[:, :, None], scales[:, None]
    if n > WRITTEN_OUT:
        x, w, token_scales, scales = segments
        return jnp.sum(jax.vmap(product)(x, w) * token_scales * scales, 0)
    terms = [product(x, w) * token_scale * scale for x, w, token_scale, scale in zip(*segments, strict=True)]
    return functools.reduce(jnp.add, terms)


def _segment_sums(x: Array, w: Array, largest: int | None) -> Array:
    """Sums of products [M, N] of a segment's x [M, s] and w [s, N].

    Of whole numbers, whose products are at most `largest`, they are those of int32. But float32 multiplies,
    which CPUs are fast at: sums below 2^24 are exact in it, larger ones are added up from such.
    """
    (M, s), N = x.shape, w.shape[1]
    if largest is None or s * largest <= EXACT:
        return jnp.matmul(x, w, precision="highest")
    parts = -(-s * largest // EXACT)
    size = -(-s // parts)
    x = pad_to(x, (M, parts * size)).reshape(M, parts, size)
    w = pad_to(w, (parts * size, N)).reshape(parts, size, N)
    sums = jnp.einsum("mps,psn->pmn", x, w, precision="highest")
    return sums.astype(jnp.int32).sum(0, dtype=jnp.int32).astype(x.dtype)


def _transposed(call: Inputs, spec: Spec, dy: Array) -> Array:
    """dy W^T [M, K], by the same blocks."""
    K, N, M = spec.K, call.codes.shape[1], dy.shape[0]
    rows = _rows(spec, call.codes.shape[0], N, K)
    stored = groups(call, spec)

    def part(i, codes: Array | None = None, *, last: bool = False) -> Array:
        block = _block(call, spec, stored, i, rows, last=last)
        block = block if codes is None else block._replace(codes=codes)
        codes = unpack_rows(block.codes, spec.format, block.packing)[: block.real]
        g = min(spec.group_size, block.real)
        n = -(-block.real // g)
        w, scales = values(pad_to(codes, (n * g, N)).reshape(n, g, N), block.groups, spec.format)
        w = (w.astype(dy.dtype) * scales[:, None].astype(dy.dtype)).reshape(-1, N)[: block.real]
        return jnp.matmul(dy, w.T, precision="highest")

    whole = K // rows
    if whole <= 1:
        return part(0, last=True)

    def copied(codes, i):
        return _codes(call, spec, i + 1, rows), part(i, codes)

    _, parts = lax.scan(copied, _codes(call, spec, 0, rows), jnp.arange(whole, dtype=jnp.uint32))
    dx = jnp.moveaxis(parts, 0, 1).reshape(M, whole * rows)
    return dx if whole * rows == K else jnp.concatenate([dx, part(whole, last=True)], axis=1)
