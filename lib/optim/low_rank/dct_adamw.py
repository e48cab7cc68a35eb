"""DCT-AdamW: AdamW on the cosine columns that carry most of the gradient."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ...formats import Format, QuantizedTensor, format_named, quantize
from ..common.chains import finish, static_size
from ..common.containers import find, named_leaves
from ..common.leafwise import LeafwiseState
from ..common.matrix_spec import MatrixSpec
from ..common.placement import automatic
from .low_rank import low_rank
from .named import make_projector


def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    update_interval: Any = 1,
    scale: Any = 1.0,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    mask: Any = None,
    error_feedback: Format | str | None = None,
    side: str = "short",
    spec: MatrixSpec | None = None,
) -> optax.GradientTransformation:
    """DCT-AdamW: W -= learning_rate * scale * D_i Adam(D_i^T G), D_i the `rank` cosines of largest |D^T G|.

    D is the orthonormal discrete cosine basis of the short side: what is kept of it are `rank` integers a
    matrix. Where the choice changes, moments move with their columns and new columns start at zero. |.| is
    Euclidean, which loses the least of G; the authors' code also ranks by sums of magnitudes.

    State, for a matrix of short side m and long side n: 4 * (r + 2 r n + 1) bytes, and with error feedback
    m n codes and 4 m ceil(n / 256) for their scales; for another leaf of size d: 4 * (2 d + 1); and 4 for the
    count.

    Args:
      update_interval: steps from one choice of columns to the next; 1 is the paper's.
      error_feedback: add what earlier steps left out to G, E <- (G + E) - D_i D_i^T (G + E), and keep E in
        this number format ("int8" in the paper); None, their code's default, drops it.
      learning_rate, rank, ... : those of `galore`.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`.

    Source: Modoranu et al. 2025 (arXiv 2505.17967).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> state = frugax.optim.dct_adamw(1e-2, rank=2).init({"kernel": jnp.ones((4, 6))})
        >>> frugax.optim.state_bytes(state) == 4 * (2 + 2 * 2 * 6 + 1) + 4
        True
    """
    format = None if error_feedback is None else format_named(error_feedback)
    rule = low_rank(
        make_projector("dct", static_size("rank", rank)),
        optax.scale_by_adam(b1, b2, eps),
        None if format is None else _Kept(format),
        scale=scale,
        spec=spec,
        side=side,
        refresh=update_interval,
        moments="transport",
    )
    if format is not None:
        rule = _with_feedback(rule, spec or MatrixSpec(), side)
    return finish(rule, learning_rate, weight_decay, mask)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A residual rule that moves nothing: it keeps the rest for the next step."""

    format: Format
    whole: ClassVar[bool] = False

    def init(self, shape: tuple[int, ...], dtype: Any) -> QuantizedTensor:
        return quantize(jnp.zeros(shape, dtype), self.format, axis=-1, group_size=256)

    def update(self, rest: Array, r: Array, u: Array, state: QuantizedTensor) -> tuple[Array, Any]:
        return jnp.zeros_like(rest), quantize(rest, self.format, axis=-1, group_size=256)


def _with_feedback(
    rule: optax.GradientTransformation, spec: MatrixSpec, side: str
) -> optax.GradientTransformation:
    """`rule`, on gradients to which what its residual rule keeps was added."""

    def update(updates: Any, state: LeafwiseState, params: Any = None) -> tuple[Any, LeafwiseState]:
        tree: Any = jax.tree.structure(updates)
        total = []
        for decision, (names, g) in zip(spec.decisions(updates, side), named_leaves(updates), strict=True):
            if decision.view is not None:
                leaf = find(state.leaves, names)

                def add(g: Array, _: None, kept: QuantizedTensor, step: Any, join=decision.view.join):
                    return g + join(kept.dequantize(g.dtype)), kept

                wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))  # bfloat16 would drop small errors
                g, _ = automatic(add, wide, None, leaf.residual, state.step)
            total.append(g)
        results, state = rule.update(tree.unflatten(total), state, params)
        return jax.tree.map(lambda x, g: x.astype(g.dtype), results, updates), state

    return optax.GradientTransformation(rule.init, update)
