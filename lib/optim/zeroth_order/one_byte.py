"""Codes of one byte for a slope in [-1, 1]; the byte 255 says that it was not finite."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import Array

from ...formats.named import dynamic8

Code = Literal["dynamic", "log"]
NOT_FINITE = 255  # in the dynamic map the code of 1, which rounds to the value below it instead
PER_E, LEAST = 8, 126  # steps of the logarithm for a factor e, and the smallest magnitude: e^(-126 / 8)


def code_named(code: Code) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """The functions from float32 to uint8, clipping to [-1, 1], and back, with zero for `NOT_FINITE`."""
    if code == "dynamic":
        return _encoded(_dynamic_code), _decoded(lambda codes: dynamic8.element.decode(codes))
    if code == "log":
        return _encoded(_log_code), _decoded(_log_value)
    raise ValueError(f"code: got {code!r}; expected 'dynamic' or 'log'")


def _encoded(code: Callable[[Array], Array]) -> Callable[[Array], Array]:
    def encode(x: Array) -> Array:
        finite = jnp.isfinite(x)
        found = code(jnp.where(finite, jnp.clip(x, -1, 1), 0.0))
        return jnp.where(finite, found, NOT_FINITE).astype(jnp.uint8)

    return encode


def _decoded(value: Callable[[Array], Array]) -> Callable[[Array], Array]:
    def decode(codes: Array) -> Array:
        wide = codes.astype(jnp.int32)
        return jnp.where(wide == NOT_FINITE, 0.0, value(wide))

    return decode


def _dynamic_code(x: Array) -> Array:
    return jnp.minimum(dynamic8.element.encode(x), NOT_FINITE - 1)


def _log_code(x: Array) -> Array:
    """0: zero; 1 to 127 the positive values e^((code - 127) / 8), and the same plus 127 the negative ones."""
    power = jnp.round(PER_E * jnp.log(jnp.abs(x)))
    code = jnp.clip(power, -LEAST, 0).astype(jnp.int32) + LEAST + 1
    code = jnp.where(power < -LEAST, 0, code)
    return jnp.where((x < 0) & (code > 0), code + LEAST + 1, code)


def _log_value(codes: Array) -> Array:
    negative = codes > LEAST + 1
    power = jnp.where(negative, codes - LEAST - 1, codes) - LEAST - 1
    value = jnp.exp(power.astype(jnp.float32) / PER_E)
    return jnp.where(codes == 0, 0.0, jnp.where(negative, -value, value))
