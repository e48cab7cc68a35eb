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
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int, Key

from ...formats import QuantizedTensor
from ..low_bit.stochastic_rounding import apply_updates_stochastic
from .directions import check_key, displace
from .distributed import check_sides
from .step import Rate, StepInfo, rate_of, taken


class Pending(NamedTuple):
    """The step that blocks have not seen yet."""

    key: Key[Array, ""]
    scalar: Float[Array, ""]


class Devices(NamedTuple):
    """The devices that share a block's visit, and the mesh axes of the two passes and of the batch."""

    mesh: Mesh
    pert_axis: str | None
    data_axis: str | None

    @property
    def slices(self) -> PartitionSpec:
        """Each device holds a slice of a block."""
        return PartitionSpec(tuple(self.mesh.axis_names))


def zo2_step(
    functions: Sequence[Callable[[Any, Any], Any]],
    blocks: Sequence[Any],
    batch: Any,
    key: Key[Array, ""],
    *,
    pending: Pending | None,
    learning_rate: Rate,
    epsilon: float,
    count: int | Int[Array, ""] | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    pert_axis: str | None = None,
    data_axis: str | None = None,
) -> tuple[list[Any], Pending, StepInfo]:
    """One MeZO step of a chain of blocks that stay in host memory.

    Args:
      functions: block i's, (params, hidden) -> hidden; the first takes the batch, the last gives the scalar
        loss (an earlier one may pass labels on). Reuse the same function objects: each is compiled once.
      blocks: parameters of each, trees of numpy arrays.
      batch: what the first function takes.
      key: fresh for each step; block i's direction is that of fold_in(key, i).
      pending: what the step before returned; None for the first step.
      learning_rate, epsilon, count: as in `mezo_step`. A step with a slope that is not finite is skipped.
      dtype: blocks of bfloat16, float16 or `QuantizedTensor`s travel and stay in host memory in their own few
        bits, are widened to this dtype on the device, and are rounded at random when they leave, so that no
        step is too small for them. None: they are worked on in their own dtype.
      mesh: devices that share the work. Each uploads one slice of a block and gathers the others from its
        neighbours, and downloads the slice that it uploaded.
      pert_axis: the mesh axis, of size 2, whose first device does the pass at +epsilon and whose second that
        at -epsilon. None: each does both.
      data_axis: the mesh axis that splits the leading axis of the batch and of each hidden state; the last
        function gives the mean loss of its part. None: all see all of it.

    Returns:
      The blocks with the step before in them, this step for the next call (or `zo2_flush`), and a `StepInfo`.
      While block i is worked on, block i + 1 is on its way to the device and block i - 1 on its way back.

    Raises:
      ValueError: as many functions as blocks are expected; `pert_axis` is not of size 2.

    Source: Wang et al. 2025, ZO2 (arXiv 2503.12668): low-bit transfer (the authors round to nearest); and
    DistZO2 (arXiv 2507.03211): sliced upload and gathering, over passes and data.

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
    check_key(key)
    devices = None if mesh is None else Devices(mesh, pert_axis, data_axis)
    if mesh is not None:
        check_sides(mesh, pert_axis)
    before = Pending(key, jnp.zeros(())) if pending is None else pending
    hidden = batch if devices is None else jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    both = (hidden, hidden) if devices is None else hidden
    new: list[Any] = []
    arriving = _upload(blocks[0], devices)
    for i, function in enumerate(functions):
        here = arriving
        if i + 1 < len(blocks):
            arriving = _upload(blocks[i + 1], devices)
        if devices is None:
            here, both = _visit(function, here, both, i, before, key, epsilon, dtype)
        else:
            shapes = _shapes(blocks[i])
            last = i + 1 == len(blocks)
            static = (function, devices, shapes, dtype, last)
            here, both = _visit_over(static, here, both, i, before, key, epsilon)
        for x in jax.tree.leaves(here):
            x.copy_to_host_async()
        if new:
            new[-1] = _download(new[-1], blocks[i - 1])
        new.append(here)
        del here
    new[-1] = _download(new[-1], blocks[-1])
    up, down = both
    info = taken((up + down) / 2, (up - down) / (2 * epsilon), rate_of(learning_rate, count))
    return new, Pending(key, info.scalar), info


def zo2_flush(blocks: Sequence[Any], pending: Pending, *, dtype: Any = None) -> list[Any]:
    """The blocks with the last step in them as well.

    Args:
      blocks, pending: from the last `zo2_step`.
      dtype: of the run.

    Example:
        >>> import frugax, jax, jax.numpy as jnp, numpy as np
        >>> zo = frugax.optim.zeroth_order
        >>> done = zo.zo2_flush([np.zeros(3, np.float32)], zo.Pending(jax.random.key(0), jnp.float32(0.1)))
        >>> bool(done[0].any())
        True
    """
    flushed = []
    for i, block in enumerate(blocks):
        flushed.append(jax.tree.map(np.array, _catch_up(jax.device_put(block), i, pending, dtype)))
    return flushed


@partial(jax.jit, static_argnums=3)
def _catch_up(block, i, pending: Pending, dtype):
    """The block with the step before in it, in the bits it travels in."""
    own = jax.random.fold_in(pending.key, i)
    if dtype is None:
        return displace(block, own, pending.scalar)
    zeros = jax.tree.map(jnp.zeros_like, _widened(block, jnp.float32))
    step = displace(zeros, own, pending.scalar)
    return apply_updates_stochastic(block, step, jax.random.fold_in(own, 2**31))


def _widened(block, dtype):
    """The block as the device works on it."""
    if dtype is None:
        return block
    packed = lambda x: isinstance(x, QuantizedTensor)  # noqa: E731
    wide = lambda x: x.dequantize(dtype) if packed(x) else x.astype(dtype)  # noqa: E731
    return jax.tree.map(wide, block, is_leaf=packed)


@partial(jax.jit, static_argnums=(0, 7))
def _visit(function, block, both, i, pending: Pending, key, epsilon, dtype):
    """The block with the step before in it, and both passes through it."""
    block = _catch_up(block, i, pending, dtype)
    own = jax.random.fold_in(key, i)
    block, own = jax.lax.optimization_barrier((block, own))
    wide = _widened(block, dtype)
    up = function(displace(wide, own, epsilon), both[0])
    down = function(displace(wide, own, -epsilon), both[1])
    return block, (up, down)


@partial(jax.jit, static_argnums=0)
def _visit_over(static, slices, both, i, pending: Pending, key, epsilon):
    """`_visit` by several devices: slices of the block in and out, hidden states [2, ...] of both passes."""
    function, devices, shapes, dtype, last = static
    mesh, pert_axis, data_axis = devices
    signs = jnp.array([1.0, -1.0])

    def visit(slices, both, signs, i, pending, key, epsilon):
        def whole(x, shape):
            flat = lax.all_gather(x, mesh.axis_names, tiled=True)
            return flat[: int(np.prod(shape))].reshape(shape)

        def own_slice(x, like):
            flat = jnp.pad(x.ravel(), (0, like.size * mesh.size - x.size))
            return lax.dynamic_slice_in_dim(flat, lax.axis_index(mesh.axis_names) * like.size, like.size)

        parts, tree = _flat(slices)
        block = tree.unflatten([whole(*pair) for pair in zip(parts, shapes, strict=True)])
        block = _catch_up(block, i, pending, dtype)
        wide, own = _widened(block, dtype), jax.random.fold_in(key, i)
        found = [
            function(displace(wide, own, signs[j] * epsilon), jax.tree.map(lambda x, j=j: x[j], both))
            for j in range(len(signs))
        ]
        after = jax.tree.map(lambda *x: jnp.stack(x), *found)
        if last and data_axis is not None:
            after = lax.pmean(after, data_axis)
        return jax.tree.map(own_slice, block, slices), after

    hidden = PartitionSpec(pert_axis, data_axis)
    some, side, all_of_it = devices.slices, PartitionSpec(pert_axis), PartitionSpec()
    return jax.shard_map(
        visit,
        mesh=mesh,
        in_specs=(some, hidden, side, *[all_of_it] * 4),
        out_specs=(some, side if last else hidden),
        check_vma=False,
    )(slices, both, signs, i, pending, key, jnp.asarray(epsilon, jnp.float32))


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)


def _shapes(block: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(x.shape for x in jax.tree.leaves(block))


def _upload(block: Any, devices: Devices | None) -> Any:
    """Begin to send a block: all of it to the device, or a slice of each leaf to each of several."""
    if devices is None:
        return jax.device_put(block)
    many = devices.mesh.size

    def padded(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(-1)
        return np.pad(flat, (0, -flat.size % many)) if flat.size % many else flat

    return jax.device_put(jax.tree.map(padded, block), NamedSharding(devices.mesh, devices.slices))


def _download(block: Any, like: Any) -> Any:
    """The block in host memory, in the shapes of `like`."""
    return jax.tree.map(lambda x, old: np.array(x).reshape(-1)[: old.size].reshape(old.shape), block, like)
