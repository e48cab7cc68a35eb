"""A tensor stored as codes and the scale of each group of them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization
from jax import Array
from jaxtyping import Key

from .format import Format
from .packing import codes_per_unit, pack, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A tensor as integer codes, with one scale for each group of them along one axis.

    Codes have the tensor's own layout, so that its sharding applies. It is a pytree of `codes` and `scales`,
    which can be stacked, mapped or sharded over every axis but `axis`.

    Attributes:
      codes: integers of the tensor's shape; codes below 8 bits are packed along `axis`.
      scales: float32, the largest magnitude of each group: the tensor's shape with n_groups along `axis`.
      format: the format of the codes.
      axis: the axis that is cut into groups, counted from the end.
      group_size: elements of a group; the last group may have fewer.
      padding: codes that packing added at the end of `axis`.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> q = frugax.formats.quantize(jnp.array([[1.0, -0.5], [0.0, 0.25]]), "int8")
        >>> q.codes.tolist(), q.scales.tolist()
        ([[127, -127], [0, 64]], [[1.0, 0.5]])
        >>> q.dequantize().shape
        (2, 2)
    """

    codes: Any  # arrays, or their places in a tree of shardings or shapes
    scales: Any
    format: Format = dataclasses.field(metadata=dict(static=True))
    axis: int = dataclasses.field(metadata=dict(static=True))
    group_size: int = dataclasses.field(metadata=dict(static=True))
    padding: int = dataclasses.field(default=0, metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        shape = list(self.codes.shape)
        shape[self.axis] = shape[self.axis] * 8 // (self.format.bits if self._packed else 8) - self.padding
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """The number of the tensor's axes."""
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in (self.codes, self.scales))

    def dequantize(self, dtype=jnp.float32) -> Array:
        """The tensor that the codes stand for."""
        codes = jnp.moveaxis(self.codes, self.axis, -1)
        if self._packed:
            codes = unpack(codes, self.format.bits, signed=self.format.lowest < 0)
            codes = codes[..., : codes.shape[-1] - self.padding]
        scales = spread(jnp.moveaxis(self.scales, self.axis, -1), self.group_size, codes.shape[-1])
        x = self.format.decode(codes.astype(jnp.int32)) * scales
        return jnp.moveaxis(x, -1, self.axis).astype(dtype)

    @property
    def _packed(self) -> bool:
        return self.format.bits < 8


def _state_dict(q: QuantizedTensor) -> dict[str, Any]:
    """The arrays that `flax.serialization` writes; the rest is in the tensor that they are restored to."""
    return {"codes": q.codes, "scales": q.scales}


def _restored(q: QuantizedTensor, state: dict[str, Any]) -> QuantizedTensor:
    return dataclasses.replace(q, codes=state["codes"], scales=state["scales"])


serialization.register_serialization_state(QuantizedTensor, _state_dict, _restored)


def spread(scales: Array, group_size: int, n: int) -> Array:
    """Repeat each group's scale [..., groups] for its elements [..., n]."""
    return jnp.repeat(scales, group_size, axis=-1)[..., :n]


def group_maxima(x: Array, group_size: int) -> Array:
    """The largest magnitude of each group along the last axis, [..., ceil(n / group_size)]."""
    n = x.shape[-1]
    x = jnp.pad(jnp.abs(x), [(0, 0)] * (x.ndim - 1) + [(0, -n % group_size)])
    return jnp.max(x.reshape(*x.shape[:-1], -1, group_size), axis=-1)


def quantize_array(
    x: Array, format: Format, axis: int, group_size: int | None, key: Key[Array, ""] | None
) -> QuantizedTensor:
    """Do as `quantize` does, without its checks."""
    axis = axis % x.ndim - x.ndim
    x = jnp.moveaxis(x.astype(jnp.float32), axis, -1)
    n = x.shape[-1]
    group_size = n if group_size is None else min(group_size, n)
    scales = group_maxima(x, group_size)
    wide = spread(scales, group_size, n)
    unit = x / jnp.where(wide == 0, 1.0, wide)
    if key is None:
        codes = format.encode(unit)
    else:
        codes = format.encode_stochastic(unit, jax.random.uniform(key, unit.shape, jnp.float32))
    padding = 0
    if format.bits < 8:
        padding = -n % codes_per_unit(format.bits)
        codes = pack(jnp.pad(codes, [(0, 0)] * (x.ndim - 1) + [(0, padding)]), format.bits)
    else:
        codes = codes.astype(format.code_dtype)
    codes, scales = (jnp.moveaxis(a, -1, axis) for a in (codes, scales))
    return QuantizedTensor(codes, scales, format, axis, group_size, padding)
