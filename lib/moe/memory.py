"""Memories of a language model: for each node of a tree of documents, hidden units of its GLU layers.

A bank is a tuple with a tree of arrays [nodes, ...] for each level. A document fetches one node of each
level, once, and the model reads their hidden units beside its own (`frugax.layers.MemoryGLU`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Int, Key

Bank = tuple[Any, ...]
_NONE = jnp.iinfo(jnp.int32).max  # in place of a node, where a batch has fewer of them than documents


def memory_bank(
    key: Key[Array, ""], memory: Any, nodes: Sequence[int], hidden: Sequence[int], *, dtype: Any = jnp.float32
) -> Bank:
    """Make the memories of every node of a tree.

    Rows of the first matrix are drawn as a dense layer's are and the second matrix is zero, so that a model
    says at first what it says without memories.

    Args:
      key: of the draws.
      memory: the collection "memory" of the model's `init`, in which every `MemoryGLU` has a place; leave
        layers out of it that should have no memories. Shapes alone will do (`jax.eval_shape`).
      nodes: of each level, as `ClusterTree.nodes`.
      hidden: hidden units that a node adds to each layer, level by level.
      dtype: of the arrays.

    Returns:
      For each level a tree like `memory`, of "gate_in" [nodes, ..., D, 2 * hidden] and "out"
      [nodes, ..., hidden, D]; the axes between are the collection's (the depth of a `Decoder`).

    Raises:
      ValueError: nodes and hidden differ in length, have numbers below 1, or memory has no layers.

    Source: Pouransari et al. 2025 (arXiv 2510.02375), its feed-forward memories.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> layer, x = frugax.layers.MemoryGLU(), jnp.ones((2, 5, 16))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> bank = frugax.moe.memory_bank(jax.random.key(1), variables["memory"], (4, 16), (8, 8))
        >>> bank[1]["out"].shape
        (16, 8, 16)
        >>> memory = frugax.moe.fetch(bank, jnp.array([[0, 1], [3, 12]]))
        >>> layer.apply({"params": variables["params"], "memory": memory}, x).shape
        (2, 5, 16)
    """
    if len(nodes) != len(hidden) or not nodes or min(*nodes, *hidden) < 1:
        raise ValueError(
            f"nodes, hidden: got {tuple(nodes)}, {tuple(hidden)}; expected as many, all numbers >= 1"
        )
    places, tree = jax.tree_util.tree_flatten_with_path(memory)
    if not places:
        raise ValueError("memory: got no layers; expected the collection of a model with MemoryGLU")
    bank = []
    for level, (n, units) in enumerate(zip(nodes, hidden, strict=True)):
        leaves = []
        for i, (path, place) in enumerate(places):
            if _is_out(path):
                leaves.append(jnp.zeros((n, *place.shape[:-3], units, place.shape[-1]), dtype))
                continue
            shape = (n, *place.shape[:-3], place.shape[-2], 2 * units)
            init = jax.nn.initializers.variance_scaling(
                1.0, "fan_in", "truncated_normal", batch_axis=tuple(range(len(shape) - 2))
            )
            leaves.append(init(jax.random.fold_in(jax.random.fold_in(key, level), i), shape, dtype))
        bank.append(jax.tree.unflatten(tree, leaves))
    return tuple(bank)


def fetch(bank: Bank, path: Int[Array, "b l"]) -> Any:
    """Gather each document's memories: the blocks of its nodes, put together along hidden units.

    Its gradient reaches the nodes on the path alone.

    Args:
      bank: from `memory_bank`, or the part of it from `take_nodes`.
      path: the nodes of each document, from `route_document`. A node that isn't there gives NaN.

    Returns:
      The model's collection "memory": "gate_in" [..., B, D, 2 * M] and "out" [..., B, M, D], where M is the
      sum of the levels' hidden units.

    Raises:
      ValueError: path has not one column for each level.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> bank = tuple({"out": jnp.arange(n).reshape(n, 1, 1)} for n in (2, 4))
        >>> frugax.moe.fetch(bank, jnp.array([[1, 3]]))["out"].tolist()
        [[[1], [3]]]
    """
    if path.ndim != 2 or path.shape[1] != len(bank) or not jnp.issubdtype(path.dtype, jnp.integer):
        raise ValueError(
            f"path: got {path.dtype}{list(path.shape)}; expected integers [documents, {len(bank)} levels]"
        )
    blocks = [
        jax.tree.map(lambda x, i=i: jnp.moveaxis(_rows(x, path[:, i]), 0, -3), level)
        for i, level in enumerate(bank)
    ]
    return jax.tree_util.tree_map_with_path(_beside, *blocks)


def distinct_nodes(path: Int[Array, "b l"], nodes: Sequence[int]) -> tuple[tuple[Array, ...], Array]:
    """List the nodes that a batch of documents fetches, each once.

    Args:
      path: the nodes of each document.
      nodes: of each level of the tree.

    Returns:
      The nodes of each level, int32 [min(B, nodes)], filled up with a number that is none's; and the path by
      their places, for `fetch` from the part that `take_nodes` gives.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> found, local = frugax.moe.distinct_nodes(jnp.array([[1, 7], [1, 4]]), (2, 8))
        >>> found[1].tolist(), local.tolist()
        ([4, 7], [[0, 1], [0, 0]])
    """
    found, local = [], []
    for column, n in zip(path.T, nodes, strict=True):
        size = min(column.shape[0], n)
        which, place = jnp.unique(column, return_inverse=True, size=size, fill_value=_NONE)
        found.append(which.astype(jnp.int32))
        local.append(place.astype(jnp.int32))
    return tuple(found), jnp.stack(local, -1)


def take_nodes(tree: Bank, nodes: tuple[Array, ...]) -> Bank:
    """Take the rows of those nodes out of a bank, or out of its optimizer's state.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> bank = ({"out": jnp.arange(4.0).reshape(4, 1, 1)},)
        >>> frugax.moe.take_nodes(bank, (jnp.array([3, 1]),))[0]["out"].ravel().tolist()
        [3.0, 1.0]
    """

    def take(x: Array, which: Array) -> Array:
        is_none = which == _NONE
        rows = _rows(x, jnp.where(is_none, 0, which))
        return jnp.where(is_none.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros_like(rows), rows)

    return tuple(
        jax.tree.map(lambda x, which=which: take(x, which), level)
        for level, which in zip(tree, nodes, strict=True)
    )


def put_nodes(tree: Bank, part: Bank, nodes: tuple[Array, ...]) -> Bank:
    """Put rows back to where `take_nodes` took them from; the other nodes stay as they are.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> bank, nodes = ({"out": jnp.zeros((4, 1, 1))},), (jnp.array([3, 1]),)
        >>> frugax.moe.put_nodes(bank, ({"out": jnp.ones((2, 1, 1))},), nodes)[0]["out"].ravel().tolist()
        [0.0, 1.0, 0.0, 1.0]
    """
    return tuple(
        jax.tree.map(lambda x, y, which=which: x.at[which].set(y, mode="drop"), level, mine)
        for level, mine, which in zip(tree, part, nodes, strict=True)
    )


def init_nodes(optimizer: optax.GradientTransformation, bank: Bank) -> Bank:
    """Make an optimizer's state of a bank, one for each node, its count of steps included.

    Example:
        >>> import frugax, jax.numpy as jnp, optax
        >>> state = frugax.moe.init_nodes(optax.adam(1e-3), ({"out": jnp.zeros((4, 1, 1))},))
        >>> state[0][0].count.shape
        (4,)
    """
    return tuple(jax.vmap(optimizer.init)(level) for level in bank)


def update_nodes(
    optimizer: optax.GradientTransformation, grads: Bank, state: Bank, bank: Bank, nodes: tuple[Array, ...]
) -> tuple[Bank, Bank]:
    """Take an optimizer's step on the fetched nodes alone, each by its own count of steps.

    A node's memories and state are what they would be if the steps that did not fetch it had not been taken.

    Args:
      optimizer: by element, such as `optax.adamw`. A schedule follows each node's own steps.
      grads: of the part of the bank that `take_nodes` gives.
      state: from `init_nodes`.
      bank: the whole one.
      nodes: which nodes the part has, from `distinct_nodes`.

    Returns:
      The bank and the state.

    Example:
        >>> import frugax, jax, jax.numpy as jnp, optax
        >>> tx, bank = optax.sgd(1.0), ({"out": jnp.zeros((4, 1, 1))},)
        >>> nodes, local = frugax.moe.distinct_nodes(jnp.array([[2], [2]]), (4,))
        >>> loss = lambda part: frugax.moe.fetch(part, local)["out"].sum()
        >>> grads = jax.grad(loss)(frugax.moe.take_nodes(bank, nodes))
        >>> bank, _ = frugax.moe.update_nodes(tx, grads, frugax.moe.init_nodes(tx, bank), bank, nodes)
        >>> bank[0]["out"].ravel().tolist()
        [0.0, 0.0, -2.0, 0.0]
    """
    part, mine = take_nodes(bank, nodes), take_nodes(state, nodes)
    after = [jax.vmap(optimizer.update)(*level) for level in zip(grads, mine, part, strict=True)]
    stepped = tuple(optax.apply_updates(level, moves) for level, (moves, _) in zip(part, after, strict=True))
    return put_nodes(bank, stepped, nodes), put_nodes(state, tuple(s for _, s in after), nodes)


def _rows(x: Array, index: Array) -> Array:
    """Rows x[index]; of floats NaN for an index that is none's, -1 included."""
    known = jnp.where(index < 0, _NONE, index)
    return jnp.take(x, known, axis=0, mode="fill")


def _beside(path: tuple[Any, ...], *blocks: Array) -> Array:
    """Blocks of the levels as one: gates beside gates, values beside values."""
    if _is_out(path):
        return jnp.concatenate(blocks, -2)
    halves = [block.reshape(*block.shape[:-1], 2, -1) for block in blocks]
    return jnp.concatenate(halves, -1).reshape(*blocks[0].shape[:-1], -1)


def _is_out(path: tuple[Any, ...]) -> bool:
    return path[-1] == jax.tree_util.DictKey("out")
