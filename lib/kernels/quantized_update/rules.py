"""The arithmetic of elementwise optimizers: what a kernel does between reading and writing 8-bit moments."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

Moments = tuple[Array, ...]


def scalars(hyper: Sequence[float | Array]) -> Array:
    """The numbers that rules are given: hyperparameters, then 1 - each, as exact as the caller has them.

    Of 0.999 in float32, 1 - 0.999 would have four digits.
    """
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in (*hyper, *(1 - h for h in hyper))])


class Rule(NamedTuple):
    """One optimizer, elementwise: `apply(gradient, moments, scalars(hyper), sqrt) -> (update, moments)`."""

    moments: int  # how many there are
    hyper: tuple[str, ...]  # what its scalars are called
    apply: Callable[..., tuple[Array, Moments]]


def _adam(g: Array, moments: Moments, hyper: Sequence[Array], sqrt=jnp.sqrt) -> tuple[Array, Moments]:
    b1, b2, eps, scale1, scale2, c1, c2, *_ = hyper
    m = b1 * moments[0] + c1 * g
    v = b2 * moments[1] + c2 * (g * g)
    return (m * scale1) / (sqrt(v * scale2) + eps), (m, v)


def _lion(g: Array, moments: Moments, hyper: Sequence[Array], sqrt=jnp.sqrt) -> tuple[Array, Moments]:
    b1, b2, c1, c2 = hyper
    m = moments[0]
    u = b1 * m + c1 * g
    # `jnp.sign` asks which chip is present, where a kernel is compiled for another.
    sign = jnp.where(u > 0, 1.0, jnp.where(u < 0, -1.0, u))
    return sign, (b2 * m + c2 * g,)


def _momentum(g: Array, moments: Moments, hyper: Sequence[Array], sqrt=jnp.sqrt) -> tuple[Array, Moments]:
    m = hyper[0] * moments[0] + g
    return m, (m,)


def _nesterov(g: Array, moments: Moments, hyper: Sequence[Array], sqrt=jnp.sqrt) -> tuple[Array, Moments]:
    m = hyper[0] * moments[0] + g
    return hyper[0] * m + g, (m,)


RULES = {
    # scale1 and scale2 undo the bias of the first steps: 1 / (1 - b1^t) and 1 / (1 - b2^t)
    "adam": Rule(2, ("b1", "b2", "eps", "scale1", "scale2"), _adam),
    "lion": Rule(1, ("b1", "b2"), _lion),
    "momentum": Rule(1, ("decay",), _momentum),
    "nesterov": Rule(1, ("decay",), _nesterov),
}
