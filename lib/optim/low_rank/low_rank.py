"""The composition of GaLore, APOLLO, FRUGAL and others: project, update in the subspace, project back."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..common.leafwise import Turn, leafwise
from ..common.matrix_spec import Decision, MatrixSpec, View
from .projectors import Gaussian, Projector
from .refresh import MOMENTS, Refresh, first_waiting, refresh_all, refresh_some, schedule
from .residuals import Residual


class Leaf(NamedTuple):
    """The state of one leaf of matrices."""

    projector: Any  # what the projector keeps
    inner: Any  # the inner transformation's state, over the projected gradient
    residual: Any  # the residual rule's state
    waiting: Any  # `Waiting` of adaptive refreshes, else ()


def low_rank(
    projector: Projector,
    inner: optax.GradientTransformation,
    residual: Residual | None = None,
    *,
    plain: optax.GradientTransformation | None = None,
    scale: Any = 1.0,
    spec: MatrixSpec | None = None,
    side: str = "short",
    refresh: int | Array | Refresh = 200,
    moments: str = "keep",
    seed: int | Array = 0,
) -> optax.GradientTransformation:
    """Run `inner` on projected gradients: update = scale * (up(inner(down(G))) + residual(G - up(down(G)))).

    Leaves that `spec` doesn't call matrices go through `plain` as they are. Each leaf has states of its own,
    so what looks across leaves (clipping by the global norm) belongs before this transformation, not in
    `inner`. Everything is kept and computed in float32 (float64 for float64 gradients); updates come back in
    the gradients' dtype. Products run at jax's default matmul precision, refreshes at the highest. Chain a
    learning rate after it.

    Args:
      projector: a value of `projectors.py`. A float as its rank is a share of the projected side.
      inner: any Optax transformation, of projected gradients [..., r, n]; it sees params projected likewise.
      residual: a value of `residuals.py`; None drops what the projector leaves out. What a `Gaussian` leaves
        out is mostly noise, so with that only a residual of the whole gradient goes.
      plain: for the other leaves; None: `inner`.
      scale: of matrices' updates.
      spec: which leaves are matrices; None: `MatrixSpec()`.
      side: which side of them is projected; see `MatrixSpec.decisions`.
      refresh: steps between refreshes of the projector, or a `Refresh`.
      moments: what becomes of inner's state at a refresh: "keep" it, "reset" it, or "transport" it into the
        new basis by C = P_new^T P_old (fields named `nu` are second moments and go by C * C).
      seed: of random projectors.

    Returns:
      A transformation whose state is a `LeafwiseState`.

    Raises:
      ValueError: naming the leaf and the argument: a rank above the projected side, leaves that are no
        floats, rules that match nothing, a state that was made with other arguments; a projector that doesn't
        go with the residual.

    Source: GaLore, Zhao et al. 2024 (arXiv 2403.03507).

    Example:
        >>> import frugax, jax.numpy as jnp, optax
        >>> opt = frugax.optim
        >>> rule = opt.low_rank(opt.DCT(rank=2), optax.scale_by_adam(), opt.SignSGD())
        >>> tx = optax.chain(rule, optax.scale(-1e-3))
        >>> params = {"w": jnp.ones((4, 6))}
        >>> updates, state = tx.update(params, tx.init(params))
        >>> updates["w"].shape, state[0].leaves["w"].inner.mu.shape
        ((4, 6), (2, 6))
    """
    spec = spec or MatrixSpec()
    refresh = refresh if isinstance(refresh, Refresh) else Refresh(refresh)
    inner = optax.with_extra_args_support(inner)
    if moments not in MOMENTS:
        raise ValueError(f"moments: got {moments!r}; expected one of {', '.join(MOMENTS)}")
    if isinstance(projector, Gaussian) and residual is not None and not residual.whole:
        raise ValueError(
            f"projector: got Gaussian, of which {type(residual).__name__} would get mostly noise "
            "(up(down(G)) is no part of G); expected RandomBasis, or a residual with whole=True"
        )
    adaptive = refresh.threshold is not None
    if adaptive and (moments == "reset" or not hasattr(projector, "find")):
        raise ValueError(
            f"refresh: got threshold={refresh.threshold} with {moments!r} and {type(projector).__name__}; "
            "expected moments 'keep' or 'transport' and a projector that keeps a basis"
        )

    def fitted(view: View, path: str = "a leaf") -> Any:
        most = projector.most(view.matrices)
        chosen: Any = projector
        return dataclasses.replace(chosen, rank=spec.rank(projector.rank, most, view, path))

    def init(decision: Decision, dtype: Any) -> Leaf:
        p, shape = fitted(decision.view, decision.path), decision.view.matrices
        kept = p.init(shape, dtype)
        r = jax.eval_shape(
            p.down, jax.ShapeDtypeStruct(shape, dtype), kept, jax.eval_shape(jax.random.key, 0)
        )
        left = () if residual is None else residual.init(shape, dtype)
        return Leaf(kept, inner.init(jnp.zeros(r.shape, r.dtype)), left, first_waiting(refresh, shape))

    def update(view: View, turn: Turn, g: Array, w: Array | None, state: Leaf):
        p = fitted(view)
        key, due = schedule(refresh, p, seed, turn)
        kept, inner_state, waiting = state.projector, state.inner, state.waiting
        if adaptive:
            kept, inner_state, waiting = refresh_some(
                refresh, p, moments, g, kept, inner_state, waiting, key, turn.step
            )
        elif moments != "keep" or jax.tree.leaves(kept):  # else there is nothing that a refresh changes
            kept, inner_state = jax.lax.cond(
                due,
                lambda kept, state: refresh_all(p, inner, moments, g, kept, state, key),
                lambda kept, state: (kept, state),
                kept,
                inner_state,
            )
        r = p.down(g, kept, key)
        u, inner_state = inner.update(r, inner_state, None if w is None else p.down(w, kept, key))
        rest_state = state.residual
        if residual is not None and residual.whole:
            total, rest_state = residual.update(g, r, u, rest_state)
            total = scale * total
        else:
            total = p.up(scale * u, g.shape, kept, key)
            if residual is not None:
                rest = g - p.up(r, g.shape, kept, key)
                rest, rest_state = residual.update(rest, r, u, rest_state)
                total = total + scale * rest
        return total, Leaf(kept, inner_state, rest_state, waiting)

    return leafwise(init, update, plain or inner, spec, side)
