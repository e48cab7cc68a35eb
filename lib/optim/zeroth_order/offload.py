"""ZO2: a model's blocks stay in host memory and visit the device one after another, once a step.

The update of a step is known only after its last block. It is applied when the block comes by the next time,
right before it is moved for that step's two passes: one upload and one download a block and step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from .directions import displace
from .step import StepInfo


class Pending(NamedTuple):
    """The step that blocks have not seen yet."""

    key: Key[Array, ""]
    scalar: Float[Array, ""]


def zo2_step(
    functions: Sequence[Callable[[Any, Any], Any]],
    blocks: Sequence[Any],
    batch: Any,
    key: Key[Array, ""],
    *,
    pending: Pending | None,
    learning_rate: float,
    epsilon: float,
) -> tuple[list[Any], Pending, StepInfo]:
    """One MeZO step of a chain of blocks that stay in host memory.

    Args:
      functions: block i's, (params, hidden) -> hidden; the first takes the batch, the last gives the scalar
        loss (an earlier one may pass labels on). Reuse the same function objects: each is compiled once.
      blocks: parameters of each, trees of numpy arrays.
      batch: what the first function takes.
      key: fresh for each step; block i's direction is that of fold_in(key, i).
      pending: what the step before returned; None for the first step.
      learning_rate, epsilon: as in `mezo_step`.

    Returns:
      The blocks with the step before in them, this step for the next call (or `zo2_flush`), and a `StepInfo`.
      While block i is worked on, block i + 1 is on its way to the device and block i - 1 on its way back.

    Source: Wang et al. 2025, ZO2 (arXiv 2503.12668). Blocks travel in their own dtype.

    Example:
        >>> import frugax, jax, jax.numpy as jnp, numpy as np
        >>> zo = frugax.optim.zeroth_order
        >>> functions = [lambda w, x: jnp.tanh(x @ w), lambda w, h: jnp.mean((h @ w) ** 2)]
        >>> blocks, pending = [np.eye(3, dtype=np.float32), np.ones((3, 2), np.float32)], None
        >>> for key in jax.random.split(jax.random.key(0), 3):
        ...     blocks, pending, info = zo.zo2_step(functions, blocks, jnp.ones((1, 3)), key, pending=pending,
        ...                                         learning_rate=1e-2, epsilon=1e-3)
        >>> blocks = zo.zo2_flush(blocks, pending)
        >>> info.loss.shape
        ()
    """
    if len(functions) != len(blocks) or not blocks:
        raise ValueError(f"blocks: got {len(blocks)}; expected one for each of {len(functions)} functions")
    before = Pending(key, jnp.zeros(())) if pending is None else pending
    up = down = batch
    new: list[Any] = []
    arriving = jax.device_put(blocks[0])
    for i, function in enumerate(functions):
        here = arriving
        if i + 1 < len(blocks):
            arriving = jax.device_put(blocks[i + 1])
        here, up, down = _visit(function, here, up, down, i, before, key, epsilon)
        for x in jax.tree.leaves(here):
            x.copy_to_host_async()
        if new:
            new[-1] = jax.tree.map(np.array, new[-1])
        new.append(here)
        del here
    new[-1] = jax.tree.map(np.array, new[-1])
    slope = (up - down) / (2 * epsilon)
    scalar = -learning_rate * slope
    return new, Pending(key, scalar), StepInfo((up + down) / 2, slope, scalar)


def zo2_flush(blocks: Sequence[Any], pending: Pending) -> list[Any]:
    """The blocks with the last step in them as well.

    Args:
      blocks, pending: from the last `zo2_step`.

    Example:
        >>> import frugax, jax, jax.numpy as jnp, numpy as np
        >>> zo = frugax.optim.zeroth_order
        >>> done = zo.zo2_flush([np.zeros(3, np.float32)], zo.Pending(jax.random.key(0), jnp.float32(0.1)))
        >>> bool(done[0].any())
        True
    """
    flushed = []
    for i, block in enumerate(blocks):
        flushed.append(jax.tree.map(np.array, _catch_up(jax.device_put(block), i, pending)))
    return flushed


@jax.jit
def _catch_up(block, i, pending: Pending):
    return displace(block, jax.random.fold_in(pending.key, i), pending.scalar)


@partial(jax.jit, static_argnums=0)
def _visit(function, block, up, down, i, pending: Pending, key, epsilon):
    """The block with the step before in it, and both passes through it."""
    block = _catch_up(block, i, pending)
    own = jax.random.fold_in(key, i)
    block, own = jax.lax.optimization_barrier((block, own))
    up = function(displace(block, own, epsilon), up)
    down = function(displace(block, own, -epsilon), down)
    return block, up, down
