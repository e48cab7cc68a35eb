"""WeLore: matrices with fast falling singular values become products of two thin ones, and train alone."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..optim.common.matrix_spec import Decision, MatrixSpec, View, leaf_path
from .lora import LowRank

Ranks = Mapping[str, tuple[int, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankPart:
    """The factors of one leaf's low-rank matrices. A pytree of their `a` and `b`.

    Attributes:
      pairs: the factors of each matrix; each has its own rank.
      places: the index of each matrix in the leaf.
      view: how the leaf is reshaped to matrices.
    """

    pairs: tuple[LowRank, ...]
    places: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    view: View = dataclasses.field(metadata=dict(static=True))


def welore_ranks(
    params: Any, reduction: float, *, spec: MatrixSpec | None = None
) -> dict[str, tuple[int, ...]]:
    """Choose each matrix's rank: the number of its (s - min s) / (max s - min s) above one common threshold.

    s are its singular values. The share `reduction` of all of them lies below the threshold, so the sum of
    the ranks falls by that share: to within one, or the number of matrices if only their smallest values go.
    Matrices with fast falling singular values lose the most. Where all s are equal, all count as the largest.

    Args:
      params: any tree of concrete arrays (their values decide shapes).
      reduction: in [0, 1): 0.5 halves the ranks' sum.
      spec: which leaves are matrices; None: `frugax.optim.MatrixSpec()`. Each matrix of a stack has its own
        rank.

    Returns:
      {path of the leaf: its matrices' ranks}.

    Raises:
      ValueError: `reduction` isn't in [0, 1), or an error of `MatrixSpec.decisions`.

    Source: Jaiswal et al. 2024 (arXiv 2407.11239), normalized as by its code.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"w": jnp.stack([jnp.diag(jnp.array(s)) for s in ([3.0, 0.2, 0.1], [5.0, 4.0, 3.0])])}
        >>> frugax.peft.welore_ranks(params, 0.5)
        {'w': (1, 2)}
    """
    if not 0 <= reduction < 1:
        raise ValueError(f"reduction: got {reduction}; expected a share in [0, 1)")
    values = {}
    for decision, leaf in _matrices(params, spec):
        matrices = _split(decision.view, leaf)
        s = np.asarray(jnp.linalg.svd(matrices.astype(jnp.float32), compute_uv=False))
        most, least = s[:, :1], s[:, -1:]
        spread = most - least
        values[decision.path] = np.where(spread > 0, (s - least) / np.where(spread > 0, spread, 1), 1)
    every = np.sort(np.concatenate([s.ravel() for s in values.values()]))
    threshold = every[round(reduction * every.size)]
    return {path: tuple((s >= threshold).sum(1).tolist()) for path, s in values.items()}


def welore_split(
    params: Any, ranks: Ranks, *, low: float = 0.5, spec: MatrixSpec | None = None
) -> tuple[dict[str, LowRankPart], Any]:
    """Split params into (factors of the low-rank matrices, everything else). Only the factors are trained.

    A matrix [m, n] with a rank r below `low` times its shorter side is replaced by its best rank-r
    approximation, which has r (m + n) parameters. Other matrices stay as they are.

    Args:
      params: any tree of concrete arrays.
      ranks: from `welore_ranks`, or chosen by hand.
      low: 0.5, as in the paper, always saves memory; 1 factors every matrix below full rank.
      spec: as for `welore_ranks`.

    Returns:
      {path: `LowRankPart`} in the leaves' dtypes, to give to the optimizer; and the tree of params. At those
      paths the tree holds the remaining matrices alone, [count, m, n].

    Raises:
      ValueError: `ranks` don't belong to these params.

    Source: Jaiswal et al. 2024 (arXiv 2407.11239).

    Example:
        >>> import frugax, jax.numpy as jnp, optax
        >>> params = {"w": jnp.stack([jnp.ones((4, 6)), jnp.eye(4, 6)]), "bias": jnp.zeros(6)}
        >>> trained, rest = frugax.peft.welore_split(params, {"w": (1, 4)})
        >>> trained["w"].places, trained["w"].pairs[0].a.shape, rest["w"].shape
        ((0,), (4, 1), (1, 4, 6))
        >>> optimizer_state = optax.adam(1e-3).init(trained)
        >>> loss = lambda trained: frugax.peft.welore_merge(trained, rest)["w"].sum()
        >>> bool(abs(loss(trained) - 28) < 1e-4)
        True
    """
    found = {decision.path: decision.view for decision, _ in _matrices(params, spec)}
    wrong = sorted(set(ranks) ^ set(found))
    if wrong:
        raise ValueError(f"ranks: got {', '.join(ranks)}; expected {', '.join(found)}, as from welore_ranks")
    parts = {}

    def split(path, leaf):
        name = leaf_path(path)
        if name not in found:
            return leaf
        view, matrices = found[name], _split(found[name], leaf)
        full = min(matrices.shape[1:])
        if len(ranks[name]) != len(matrices) or not all(1 <= r <= full for r in ranks[name]):
            expected = f"{len(matrices)} from 1 to {full}"
            raise ValueError(f"ranks: got {ranks[name]} for {name}; expected {expected}")
        places = tuple(i for i, r in enumerate(ranks[name]) if r < low * full)
        if not places:
            return leaf
        parts[name] = LowRankPart(tuple(_factors(matrices[i], ranks[name][i]) for i in places), places, view)
        return matrices[np.setdiff1d(np.arange(len(matrices)), places)]

    rest = jax.tree_util.tree_map_with_path(split, params)
    return parts, rest


def welore_merge(trained: Mapping[str, LowRankPart], rest: Any) -> Any:
    """Rebuild the params that a model takes from the two results of `welore_split`. Differentiable.

    Factors of different ranks can't be stacked, so the compiled program grows with the number of matrices.

    Args:
      trained, rest: from `welore_split`.

    Raises:
      ValueError: the two come from different trees.

    Example: see `welore_split`.
    """
    unused = set(trained)

    def merge(path, leaf: Array) -> Array:
        name = leaf_path(path)
        if name not in trained:
            return leaf
        unused.discard(name)
        part = trained[name]
        *batch, m, n = part.view.matrices
        many = int(np.prod(batch, dtype=int))
        if leaf.shape != (many - len(part.places), m, n):
            expected = [many - len(part.places), m, n]
            raise ValueError(f"rest: got {list(leaf.shape)} at {name}; expected {expected} beside `trained`")
        low = dict(zip(part.places, part.pairs, strict=True))
        dense = itertools.count()
        matrices = [low[i].product.astype(leaf.dtype) if i in low else leaf[next(dense)] for i in range(many)]
        return part.view.join(jnp.stack(matrices))

    params = jax.tree_util.tree_map_with_path(merge, rest)
    if unused:
        raise ValueError(f"trained: got {', '.join(sorted(unused))}; expected paths of rest")
    return params


def _matrices(params: Any, spec: MatrixSpec | None) -> list[tuple[Decision, Array]]:
    decisions = (spec or MatrixSpec()).decisions(params, side="rows")
    pairs = zip(decisions, jax.tree.leaves(params), strict=True)
    return [(decision, leaf) for decision, leaf in pairs if decision.view is not None]


def _split(view: View | None, leaf: Array) -> Array:
    """All matrices of a leaf [count, m, n]."""
    assert view is not None  # `_matrices` yields only leaves that have one
    return view.split(leaf).reshape(-1, *view.matrices[-2:])


def _factors(w: Array, rank: int) -> LowRank:
    u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[:rank])  # factors of equal norm, so that one learning rate suits both
    return LowRank(
        (u[:, :rank] * root[None]).astype(w.dtype), (root[:, None] * vt[:rank]).astype(w.dtype), 1.0
    )
