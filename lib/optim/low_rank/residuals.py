"""Residual rules: updates from the part of a gradient that a projector leaves out.

A residual rule is a frozen value with
  whole                       True: it gets the whole gradient, and nothing is projected back
  init(shape)                 its state
  update(rest, r, u, state)   (the rest's update [..., m, n], state), r being the projected gradient and u its
                              update, both [..., r, n]
"""

import dataclasses
import math
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array


@runtime_checkable
class Residual(Protocol):
    """The interface of residual rules that `low_rank` uses."""

    whole: Any

    def init(self, shape: tuple[int, ...], dtype: Any) -> Any: ...
    def update(self, rest: Array, r: Array, u: Array, state: Any) -> tuple[Array, Any]: ...


@dataclasses.dataclass(frozen=True)
class SGD:
    """The rest as it is, times `scale`. No state.

    Source: FRUGAL, Zmushko et al. 2024 (arXiv 2411.07837).

    Example:
        >>> import frugax
        >>> frugax.optim.SGD(scale=0.1).whole
        False
    """

    scale: Any = 1.0
    whole: ClassVar[bool] = False

    def init(self, shape: tuple[int, ...], dtype: Any) -> tuple:
        return ()

    def update(self, rest: Array, r: Array, u: Array, state: tuple) -> tuple[Array, tuple]:
        return self.scale * rest, state


@dataclasses.dataclass(frozen=True)
class SignSGD(SGD):
    """The rest's signs, times `scale`. No state.

    Source: FRUGAL, Zmushko et al. 2024 (arXiv 2411.07837).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> rest = jnp.array([-3.0, 0.0])
        >>> frugax.optim.SignSGD().update(rest, rest, rest, ())[0]
        Array([-1.,  0.], dtype=float32)
    """

    def update(self, rest: Array, r: Array, u: Array, state: tuple) -> tuple[Array, tuple]:
        return self.scale * jnp.sign(rest), state


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The rest, scaled as much as the inner optimizer scaled what was projected: |u| / |r| by column or
    matrix.

    Attributes:
      per: "column" of the view [..., m, n], or "matrix".
      whole: scale the whole gradient and let that be the update (APOLLO); False: what is left out (Fira).
      limit: how much the norm of what it returns may grow from one step to the next; None: at will. Keeps one
        number a matrix.
      floor: share of the norm sqrt(r n) that signs would have, up to which it may grow at will. Without it, a
        hundred steps of vanishing gradients would take a thousand to come back from.

    Source: Fira, Chen et al. 2024 (arXiv 2410.01623); APOLLO, Zhu et al. 2024 (2412.05270). The floor is
    ours: the authors' code adds 1e-8.

    Example:
        >>> import frugax
        >>> frugax.optim.Scaled("matrix", whole=True).limit
        1.01
    """

    per: str = "column"
    whole: bool = False
    limit: Any = 1.01
    floor: Any = 0.1

    def __post_init__(self):
        if self.per not in ("column", "matrix"):
            raise ValueError(f"per: got {self.per!r}; expected 'column' or 'matrix'")

    def init(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return () if self.limit is None else jnp.zeros(shape[:-2], dtype)

    def update(self, rest: Array, r: Array, u: Array, state: Any) -> tuple[Array, Any]:
        axes = -2 if self.per == "column" else (-2, -1)
        size = _norm(r, axes)
        factor = jnp.where(size > 0, _norm(u, axes) / jnp.where(size > 0, size, 1), 0)
        if self.limit is None:
            return factor * rest, state
        # The norm of factor * rest, without computing that: the matrix is read twice in all, written once.
        norm = _norm(factor * _norm(rest, axes), (-2, -1))
        before = state[..., None, None]
        least = self.floor * math.prod(r.shape[-2:]) ** 0.5
        # The first step has nothing to grow from.
        most = jnp.where(before > 0, jnp.maximum(self.limit * before, least), norm)
        shrink = jnp.where(norm > most, most / jnp.where(norm > 0, norm, 1), 1)
        return shrink * factor * rest, jnp.minimum(norm, most)[..., 0, 0]


def _norm(x: Array, axes) -> Array:
    # As a product: XLA takes that in any order of axes, and would copy a transposed x before summing squares.
    squares = jnp.einsum("...mn,...mn->...n", x, x, precision="highest")[..., None, :]
    return jnp.sqrt(squares if axes == -2 else jnp.sum(squares, axis=-1, keepdims=True))
