"""Block sizes of the TPU kernels, and how they follow from a call."""

from dataclasses import dataclass

import jax.numpy as jnp

from ..common.chips import LANES, SUBLANES, VMEM_LIMIT
from ..common.tiling import largest, round_up
from .inputs import Inputs

SHORTEST = 16  # tokens of a chunk: a register of bfloat16 rows


@dataclass(frozen=True)
class Tiling:
    """Block sizes of a call, for the matrix unit and for VMEM."""

    chunk: int  # tokens whose scores form one [chunk, chunk] matrix: a power of two from 16 to 128
    block: int  # tokens a grid step reads, a multiple of chunk
    heads: int  # heads a grid step works on, at most 8


def heads_per_step(call: Inputs) -> list[int]:
    """Numbers of heads, at most 8, that hold whole groups of q, k and v, or lie in one."""
    H = call.heads
    groups = [H // x.shape[2] for x in (call.q, call.k, call.v)]
    numbers = range(1, SUBLANES + 1)
    return [n for n in numbers if H % n == 0 and all(n % r == 0 or r % n == 0 for r in groups)]


def vmem_bytes(call: Inputs, tiling: Tiling, *, backward: bool) -> int:
    """VMEM that the kernel's blocks (two of each, to overlap copies) and its carried states take."""
    K, V = (round_up(x.shape[-1], LANES) for x in (call.q, call.v))
    size = call.q.dtype.itemsize
    tokens = tiling.block * tiling.heads
    per_token = (2 * K + 2 * V) * size  # q, k, v and out, or out's cotangent
    if backward:
        per_token += 4 * (2 * K + V)  # their gradients, float32 at most
    if call.log_decay is not None and call.log_decay.ndim == 4:
        per_token += K * call.log_decay.dtype.itemsize * (2 if backward else 1)
    states = 4 * K * V * tiling.heads * (5 + (2 * tiling.block // tiling.chunk if backward else 0))
    scores = 4 * tiling.chunk * (8 * tiling.chunk + 24 * K + 8 * V)  # what may spill from registers
    return 2 * tokens * per_token + states + scores


def choose(call: Inputs, *, backward: bool, interpret: bool = False, shortest: int = SHORTEST) -> Tiling:
    """The largest blocks that fit VMEM; long enough chunks to fill the matrix unit, no longer than the call.

    An interpreted kernel is compiled by XLA for CPU, which takes long over long bodies: it gets small blocks.
    Chunks have `shortest` tokens or more.
    """
    if interpret:
        return Tiling(32, 64, 1)
    T = call.q.shape[1]
    chunk = min(128, max(shortest, 1 << (T - 1).bit_length()))

    def fits(block: int, heads: int) -> bool:
        return vmem_bytes(call, Tiling(chunk, block, heads), backward=backward) <= VMEM_LIMIT

    numbers = heads_per_step(call)
    heads = largest(numbers, lambda n: fits(chunk, n), otherwise=numbers[0])
    most = 2 * max(min(256 if backward else 512, T), chunk)
    blocks = [size for size in (chunk << n for n in range(6)) if size < most]
    return Tiling(chunk, largest(blocks, lambda size: fits(size, heads), otherwise=chunk), heads)


def itemsize_fits(dtype: jnp.dtype) -> bool:
    """Say whether the matrix unit takes the dtype."""
    return jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
