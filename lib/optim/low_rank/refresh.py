"""Schedules by which projectors are found anew, and the inner optimizer's state at a refresh."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ...formats import QuantizedTensor, quantize
from ..common.chains import static_size
from ..common.leafwise import Turn
from .projectors import Projector

MOMENTS = ("keep", "reset", "transport")


@dataclasses.dataclass(frozen=True)
class Refresh:
    """The schedule by which projectors are found anew.

    Attributes:
      every: steps from one refresh to the next, at least 1; may be traced.
      stagger: spread the leaves' refreshes over the interval, so that no step pays for all of them. Adaptive
        refreshes spread by themselves.
      threshold: adaptive, if given: a matrix's interval doubles at each refresh where the mean of its last
        `queue` similarities is that large; a similarity is the |cosine| between the first vectors of the new
        basis and the last one. Needs a projector that keeps a basis, and keeps 2 + queue numbers a matrix.
      queue: how many similarities the mean is over; before there are so many, no interval changes.

    Raises:
      ValueError: an attribute is invalid; the message names it.

    Source: the adaptive rule is Q-GaLore's, Zhang et al. 2024 (arXiv 2407.08296).

    Example:
        >>> import frugax
        >>> frugax.optim.Refresh(every=200, threshold=0.4).queue
        5
    """

    every: Any = 200
    stagger: bool = False
    threshold: Any = None
    queue: int = 5

    def __post_init__(self):
        if isinstance(self.every, int) and self.every < 1:
            raise ValueError(f"refresh: got {self.every} steps (update_interval); expected at least 1")
        if self.threshold is None:
            return
        if self.stagger:
            raise ValueError("stagger: got True with a threshold; expected one of the two")
        static_size("queue", self.queue)
        if isinstance(self.threshold, int | float) and not 0 < self.threshold <= 1:  # else it is traced
            raise ValueError(f"threshold: got {self.threshold}; expected a cosine in (0, 1]")


class Waiting(NamedTuple):
    """Adaptive refreshes: for each matrix its next step, its interval, and its last similarities.

    Similarities [..., queue], the newest last, are -inf before there are any, and so is their mean.
    """

    next: Array
    interval: Array
    similarities: Array


def first_waiting(refresh: Refresh, shape: tuple[int, ...]) -> Waiting | tuple:
    """Make the first state of adaptive refreshes for matrices of `shape` [..., m, n]; () if not adaptive."""
    if refresh.threshold is None:
        return ()
    now = jnp.zeros(shape[:-2], jnp.int32)
    none = jnp.full((*shape[:-2], refresh.queue), -jnp.inf, jnp.float32)
    return Waiting(now, now + jnp.asarray(refresh.every, jnp.int32), none)


def schedule(refresh: Refresh, projector: Projector, seed: Any, turn: Turn) -> tuple[Array, Array]:
    """The leaf's key, the same between its refreshes, and whether one is due."""
    every = jnp.asarray(refresh.every, jnp.int32)
    shift = turn.leaf * every // turn.leaves if refresh.stagger and not projector.together else 0
    key = jax.random.key(seed)
    if not projector.together:
        key = jax.random.fold_in(key, turn.path_hash)
    due = ((turn.step + shift) % every == 0) | (turn.step == 0)
    return jax.random.fold_in(key, (turn.step + shift) // every), due


def refresh_all(
    projector: Projector,
    inner: optax.GradientTransformation,
    moments: str,
    g: Array,
    kept: Any,
    state: Any,
    key: Array,
) -> tuple[Any, Any]:
    """Refresh all matrices of a leaf: the projector's new state, and inner's."""
    new = projector.refresh(g, kept, key)
    if moments == "reset":
        state = _like(inner.init(jnp.zeros_like(projector.down(g, new, key))), state)
    elif moments == "transport":
        state = _transported(state, projector.change(kept, new), g.shape[-1])
    return _like(new, kept), state


def refresh_some(
    refresh: Refresh,
    projector: Any,
    moments: str,
    g: Array,
    kept: Any,
    state: Any,
    waiting: Waiting,
    key: Array,
    step: Array,
) -> tuple[Any, Any, Waiting]:
    """Refresh the matrices of a leaf that are due, one after the other, and set when they are due next."""
    due = step >= waiting.next
    key = jax.random.fold_in(key, step)
    batch = g.shape[:-2]

    def anew(kept, state, waiting):
        old = projector.unpack(kept)

        def one(matrix):
            g_MN, p_MR, is_due = matrix
            return jax.lax.cond(
                is_due, lambda: projector.look(g_MN, p_MR, key).astype(p_MR.dtype), lambda: p_MR
            )

        def flat(x):
            return x.reshape(-1, *x.shape[len(batch) :])

        new = jax.lax.map(one, (flat(g), flat(old), flat(due))).reshape(old.shape)
        size = jnp.linalg.norm(old[..., 0], axis=-1) * jnp.linalg.norm(new[..., 0], axis=-1)
        cosine = jnp.sum(old[..., 0] * new[..., 0], axis=-1) / jnp.where(size > 0, size, 1)
        newest = jnp.abs(cosine)[..., None].astype(jnp.float32)  # a singular vector's sign means nothing
        queue = jnp.concatenate([waiting.similarities[..., 1:], newest], axis=-1)
        queue = jnp.where(size[..., None] > 0, queue, waiting.similarities)  # the first has nothing before it
        longer = jnp.mean(queue, axis=-1) >= refresh.threshold
        interval = jnp.where(longer, 2 * waiting.interval, waiting.interval)
        after = Waiting(step - step % interval + interval, interval, queue)
        waiting = jax.tree.map(
            lambda a, b: jnp.where(due.reshape(due.shape + (1,) * (a.ndim - due.ndim)), a, b), after, waiting
        )
        packed = _like(projector.pack(new), kept)
        if moments == "transport":
            change = jnp.where(due[..., None, None], projector.change(kept, packed), jnp.eye(old.shape[-1]))
            state = _transported(state, change, g.shape[-1])
        return packed, state, waiting

    return jax.lax.cond(jnp.any(due), anew, lambda *unchanged: unchanged, kept, state, waiting)


def _transported(state: Any, change: Array, n: int) -> Any:
    """Inner's moments [..., r, n] in the new basis; second moments by the squares of `change` [..., r, r].

    Second moments are what is called `nu`, and codes of a format without negative values. A history of
    moments [..., history, r, n] turns as each of them does.
    """

    def move(path, leaf):
        if leaf.ndim < 2 or leaf.shape[-2:] != (change.shape[-1], n):
            return leaf
        is_second = jax.tree_util.keystr(path[-1:], simple=True) == "nu"
        if isinstance(leaf, QuantizedTensor):
            is_second = is_second or not leaf.format.signed
            moved = turned(leaf.dequantize(), is_second)
            return quantize(moved, leaf.format, axis=leaf.axis, group_size=leaf.group_size)
        return turned(leaf, is_second)

    def turned(moment, is_second):
        c = change.astype(moment.dtype)
        c = jnp.expand_dims(c, tuple(range(c.ndim - 2, moment.ndim - 2)))
        return (c * c if is_second else c) @ moment

    return jax.tree_util.tree_map_with_path(move, state, is_leaf=lambda x: isinstance(x, QuantizedTensor))


def _like(new: Any, old: Any) -> Any:
    """`new` in the dtypes of `old`, as both branches of a conditional need."""
    return jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), new, old)
