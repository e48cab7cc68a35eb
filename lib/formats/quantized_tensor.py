"""A tensor stored as codes and the scale of each group of them."""

import dataclasses
import functools
import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import serialization
from jax import Array
from jaxtyping import Key

from .format import Format
from .packing import codes_per_unit, pack, unpack
from .scales import AbsMean, Scaling, split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A tensor as integer codes, with one scale for each group of them along one axis.

    Codes have the tensor's own layout, so that its sharding applies. It is a pytree of arrays, which can be
    stacked, mapped or sharded over every axis but `axis`.

    Attributes:
      codes: integers of the tensor's shape; codes below 8 bits are packed along `axis` (`formats.packing`).
      scales: of each group, as the format's scale scheme stores them: floats, exponents or `CodedScales` in
        the tensor's shape with n_groups along `axis`; of one scale for a matrix, with 1 for both axes.
      format: the format of the codes.
      axis: the axis that is cut into groups, counted from the end.
      group_size: elements of a group; the last group may have fewer.
      padding: codes that packing added at the end of `axis`.
      zeros: uint8 like scales, the code of zero in asymmetric formats; else None.
      choices: in formats of several codebooks, each group's in two bits, packed along `axis`; else None.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> q = frugax.formats.quantize(jnp.array([[127.0, -0.5], [0.0, 0.25]]), "int8")
        >>> q.codes.tolist(), q.scales[0, 0].item()
        ([[127, -127], [0, 64]], 1.0)
        >>> q.dequantize().shape
        (2, 2)
    """

    codes: Any  # arrays, or their places in a tree of shardings or shapes
    scales: Any
    format: Format = dataclasses.field(metadata=dict(static=True))
    axis: int = dataclasses.field(metadata=dict(static=True))
    group_size: int = dataclasses.field(metadata=dict(static=True))
    padding: int = dataclasses.field(default=0, metadata=dict(static=True))
    zeros: Any = None
    choices: Any = None

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
    def size(self) -> int:
        """The number of the tensor's elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that codes, scales and what else is stored take."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def dequantize(self, dtype=jnp.float32) -> Array:
        """The tensor that the codes stand for.

        Raises:
          ValueError: codes or scales can't be those of the format (`check_storage`).
        """
        return _dequantized(self, jnp.dtype(dtype))

    def _values(self, dtype) -> Array:
        codes, scaling = self.unpacked(), self.scaling()
        n = codes.shape[-1]
        # The product of a value and its scale is rounded once.
        wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
        x = self.format.decode(split(codes, self.group_size), scaling, wide)
        return jnp.moveaxis(x.reshape(*x.shape[:-2], -1)[..., :n], -1, self.axis).astype(dtype)

    def unpacked(self) -> Array:
        """The int32 codes, with `axis` moved to the end."""
        codes = jnp.moveaxis(self.codes, self.axis, -1)
        if not self._packed:
            return codes.astype(jnp.int32)
        codes = unpack(codes, self.format.bits, signed=self.format.element.lowest < 0)
        return codes[..., : codes.shape[-1] - self.padding]

    def scaling(self) -> Scaling:
        """The stored scales, zeros and choices of each group, with `axis` moved to the end."""
        stored = Scaling(self.scales, self.zeros, self.choices)
        stored = jax.tree.map(lambda x: jnp.moveaxis(x, self.axis, -1), stored)
        if stored.choices is None:
            return stored
        groups = -(-self.shape[self.axis] // self.group_size)
        return stored._replace(choices=unpack(stored.choices, 2, signed=False)[..., :groups])

    @property
    def _packed(self) -> bool:
        return self.format.bits < 8


def check_storage(q: QuantizedTensor) -> None:
    """Raise ValueError where codes and scales can't be those of the format, by their shapes and dtypes.

    Codes do not say what they stand for: of two formats that store alike, as int4 and fp4_e2m1 do, one may be
    taken for the other. A file says its format by name, and is refused under another.

    Args:
      q: a tensor that was made, or changed, by hand.

    Raises:
      ValueError: naming the format and what it would store.

    Example:
        >>> import dataclasses, frugax, jax.numpy as jnp
        >>> q = frugax.formats.quantize(jnp.ones((32, 4)), "int4")
        >>> try:
        ...     dataclasses.replace(q, format=frugax.formats.int3).dequantize()
        ... except ValueError as error:
        ...     print(error)
        format: got int3 for codes uint8[16, 4]; expected a multiple of 3 bytes along axis -2
    """
    format, codes, axis = q.format, q.codes, q.axis if q.axis < 0 else q.axis - q.ndim

    def refuse(name: str, x: Any, expected: str) -> NoReturn:
        got = f"{name} {x.dtype}{list(x.shape)}"
        raise ValueError(f"format: got {format.name} for {got}; expected {expected}")

    packed, unit = format.bits < 8, codes_per_unit(format.bits)
    dtype = jnp.dtype(jnp.uint8 if packed else format.element.code_dtype)
    if codes.dtype != dtype:
        refuse("codes", codes, f"{dtype}")
    if packed and codes.shape[axis] * 8 % (format.bits * unit):
        refuse("codes", codes, f"a multiple of {format.bits * unit // 8} bytes along axis {axis}")
    if not 0 <= q.padding < unit:
        raise ValueError(f"padding: got {q.padding} for {format.name}; expected 0..{unit - 1}")
    groups = -(-q.shape[axis] // q.group_size)
    want = _stored_alike(format)
    got = Scaling(q.scales, q.zeros, q.choices)
    for name, mine, like in zip(Scaling._fields, got, want, strict=True):
        if (mine is None) != (like is None):
            has, wants = ("without", "them") if mine is None else ("with", "none")
            raise ValueError(f"format: got {format.name} {has} {name}; expected {wants}")
        if mine is None:
            continue
        structures: list[Any] = [jax.tree.structure(x) for x in (mine, like)]
        if structures[0] != structures[1]:
            kind, scheme = type(mine).__name__, type(format.scheme).__name__
            raise ValueError(f"format: got {format.name} for scales of {kind}; expected those of {scheme}")
        first, first_like = jax.tree.leaves(mine)[0], jax.tree.leaves(like)[0]  # one for each group
        floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (first, first_like))
        if not floats and first.dtype != first_like.dtype:
            refuse(name, first, f"{first_like.dtype}")
        count = -(-groups // 4) if name == "choices" else groups
        if first.shape[axis] != count and not isinstance(format.scheme, AbsMean):
            refuse(name, first, f"{count} along axis {axis} for groups of {q.group_size}")


@functools.cache
def _stored_alike(format: Format) -> Scaling:
    """Return the shapes and dtypes that the format stores of a group."""
    return jax.eval_shape(format.fit, jax.ShapeDtypeStruct((1, 1, 2), jnp.float32))


def _state_dict(q: QuantizedTensor) -> dict[str, Any]:
    """The arrays and the format's name, which `flax.serialization` writes."""
    return {"format": q.format.name, **_named(q)}


def _restored(q: QuantizedTensor, state: dict[str, Any]) -> QuantizedTensor:
    if state.get("format") != q.format.name:
        raise ValueError(f"format: got {state.get('format')} in the file; expected {q.format.name}")
    return jax.tree.unflatten(jax.tree.structure(q), [state[name] for name in _named(q)])


def _named(q: QuantizedTensor) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(q)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


serialization.register_serialization_state(QuantizedTensor, _state_dict, _restored)


def from_codes(
    codes: Array, scaling: Scaling, format: Format, *, axis: int = -1, group_size: int
) -> QuantizedTensor:
    """Pack codes [..., n], whose groups lie along the last axis, into the tensor that has them along `axis`.

    Args:
      codes: the integers that `format.encode` gives.
      scaling: of the groups, as `format.fit` gives it.
      format: their format.
      axis: where the last axis belongs, counted from the end.
      group_size: elements of a group.

    Example:
        >>> import jax.numpy as jnp
        >>> from frugax import formats
        >>> int4, x = formats.format_named("int4"), jnp.array([[3.75, -7.5], [7.5, 0.0]])
        >>> scaling = int4.fit(x[:, None])  # each row is a group
        >>> codes = int4.encode(x[:, None], scaling)[:, 0]
        >>> formats.from_codes(codes, scaling, int4, axis=-2, group_size=2).dequantize().tolist()
        [[4.0, 7.0], [-7.0, 0.0]]
    """
    padding = 0
    if format.bits < 8:
        padding = -codes.shape[-1] % codes_per_unit(format.bits)
        codes = pack(jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)]), format.bits)
    else:
        codes = codes.astype(format.element.code_dtype)
    if scaling.choices is not None:
        chosen = [(0, 0)] * (scaling.choices.ndim - 1) + [(0, -scaling.choices.shape[-1] % 4)]
        scaling = scaling._replace(choices=pack(jnp.pad(scaling.choices, chosen), 2))
    codes, scaling = jax.tree.map(lambda x: jnp.moveaxis(x, -1, axis), (codes, scaling))
    return QuantizedTensor(
        codes, scaling.scales, format, axis, group_size, padding, scaling.zeros, scaling.choices
    )


# One program where it is called outside of `jit`, not one for each of its operations.
@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def quantize_array(
    x: Array, format: Format, axis: int, group_size: int, key: Key[Array, ""] | None
) -> QuantizedTensor:
    """Do as `quantize` does, without its checks; group_size is that of `format.group_of`."""
    axis = axis % x.ndim - x.ndim
    x = jnp.moveaxis(x.astype(jnp.float32), axis, -1)
    n = x.shape[-1]
    groups = split(x, group_size)
    fitted = format if key is None else format.covering()
    scaling = fitted.fit(groups)
    uniform = None if key is None else jax.random.uniform(key, groups.shape, jnp.float32)
    codes = format.encode(groups, scaling, uniform)
    codes = codes.reshape(*x.shape[:-1], -1)[..., :n]
    return from_codes(codes, scaling, format, axis=axis, group_size=group_size)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _dequantized(q: QuantizedTensor, dtype: Any) -> Array:
    check_storage(q)
    return q._values(dtype)
