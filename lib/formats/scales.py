"""Scale schemes: what is stored for each group of codes, and how it is found from the group's values.

Groups are the last axis of x [..., G, g]; a scheme gives a `Scaling` of arrays [..., G]. A value is then
(element's value - zero) * scale. Constants are multiplied with, not divided by, as XLA does it under jit: a
tensor has the same codes with and without.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .element import Element, round_half_away
from .minifloat import Minifloat

SMALLEST = 2.0**-126  # float32's smallest normal number: XLA on CPU takes smaller ones for zero


class Scaling(NamedTuple):
    """The stored parameters of groups, [..., G] each.

    Attributes:
      scales: in the scheme's own storage: floats, exponents (uint8) or `CodedScales`.
      zeros: uint8 codes of zero, of asymmetric formats.
      choices: uint8, the codebook of each group, of formats that have several.
    """

    scales: Any
    zeros: Any = None
    choices: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedScales:
    """Scales that are themselves codes: value(code) * outer + offset. Example: see `TwoLevel`.

    Attributes:
      codes: uint8, one for each group.
      outer: float32, one for the whole matrix, for each column, or for each block of `block` scales across
        its columns.
      offset: float32, one for each matrix; None is zero.
      element: the codes' element format.
      block: scales that share an `outer`; None: all of a matrix, or of a column.
    """

    codes: Any
    outer: Any
    offset: Any
    element: Element = dataclasses.field(metadata=dict(static=True))
    block: int | None = dataclasses.field(default=None, metadata=dict(static=True))


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """The largest magnitude becomes the element's largest value.

    Attributes:
      dtype: of the stored scales.
      beyond: how far above the element's largest value the largest magnitude comes to lie. Half a step of an
        integer lowers the squared error of normally distributed values.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> int4 = frugax.formats.format_named("int4").element  # -7 .. 7
        >>> frugax.formats.AbsMax().fit(jnp.array([[7.0, -14.0]]), int4).scales.tolist()
        [2.0]
    """

    dtype: str = "float32"
    beyond: float = 0.0
    by_group = True  # a group's scale depends on its own values alone

    def fit(self, x: Array, element: Element) -> Scaling:
        scales = (group_maxima(x) * (1 / (element.largest + self.beyond))).astype(self.dtype)
        return Scaling(finite_or_nan(scales))

    def covering(self) -> "AbsMax":
        """The scheme that leaves no value outside of the codes' range, which unbiased rounding needs."""
        return dataclasses.replace(self, beyond=0.0)

    def scale(self, scaling: Scaling) -> Array:
        """The float32 scale of each group."""
        return scaling.scales.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class AbsMean(AbsMax):
    """The mean magnitude becomes 1, one scale for each matrix: ternary weights.

    Source: Ma et al. 2024, The Era of 1-bit LLMs (arXiv 2402.17764).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> ternary = frugax.formats.format_named("ternary").element
        >>> frugax.formats.AbsMean().fit(jnp.array([[7.0, -1.0]]), ternary).scales.tolist()
        [4.0]
    """

    by_group = False

    def fit(self, x: Array, element: Element) -> Scaling:
        matrix = (-1, -2, -3)[: x.ndim]
        mean = finite_or_nan(jnp.mean(jnp.abs(x), axis=matrix).astype(self.dtype))
        return Scaling(mean.reshape(mean.shape + (1,) * (x.ndim - 1 - mean.ndim)))


@dataclasses.dataclass(frozen=True)
class MeanMagnitude(AbsMax):
    """The mean magnitude of a group becomes 1, which gives signs the least squared error; zeros don't count.

    Source: Rastegari et al. 2016, XNOR-Net (arXiv 1603.05279).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.formats.quantize(jnp.array([7.0, -1.0, -4.0]), "int1").dequantize().tolist()
        [4.0, -4.0, -4.0]
    """

    def fit(self, x: Array, element: Element) -> Scaling:
        count = jnp.maximum(jnp.sum(x != 0, -1), 1).astype(jnp.float32)  # a group may be filled up with zeros
        return Scaling(finite_or_nan((jnp.sum(jnp.abs(x), -1) / count).astype(self.dtype)))

    def covering(self) -> AbsMax:
        return AbsMax(self.dtype)


@dataclasses.dataclass(frozen=True)
class Asymmetric(AbsMax):
    """The range from the least to the largest value, zero included, is cut evenly; zero has a code.

    Attributes:
      spare: steps left over: with one, no end of the range is cut off where zero is rounded to a code.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> uint4 = frugax.formats.format_named("uint4").element  # 0 .. 15
        >>> scaling = frugax.formats.Asymmetric().fit(jnp.array([[-5.0, 10.0]]), uint4)
        >>> scaling.scales.tolist(), scaling.zeros.tolist()
        ([1.0], [5])
    """

    spare: int = 0

    def covering(self) -> "Asymmetric":
        return dataclasses.replace(self, spare=1)

    def fit(self, x: Array, element: Element) -> Scaling:
        low, high = jnp.minimum(jnp.min(x, -1), 0.0), jnp.maximum(jnp.max(x, -1), 0.0)
        scales = finite_or_nan(((high - low) * (1 / (element.largest - self.spare))).astype(self.dtype))
        wide = scales.astype(jnp.float32)
        zeros = -low / jnp.where(wide < SMALLEST, 1.0, wide)
        zeros = jnp.ceil(zeros) if self.spare else round_half_away(zeros)
        return Scaling(scales, jnp.clip(zeros, 0, element.highest).astype(jnp.uint8))


@dataclasses.dataclass(frozen=True)
class PowerOfTwo:
    """A power of two, stored in 8 bits as E8M0: 2^(code - 127); 255 is NaN.

    The exponent of the group's largest magnitude, less that of the element's largest value.

    Attributes:
      rounding: "nearest": one more if the largest magnitude, in the element's digits, rounds up to the next
        power of two; "floor": never, as the specification's section 6.3: more values saturate; "up": one more
        where any would saturate.

    Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.4.1 and 6.3.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> scheme, fp4 = frugax.formats.PowerOfTwo(), frugax.formats.format_named("fp4_e2m1").element
        >>> scaling = scheme.fit(jnp.array([[0.9, -6.0], [0.1, 12.0]]), fp4)
        >>> scaling.scales.tolist(), scheme.scale(scaling).tolist()
        ([127, 128], [1.0, 2.0])
    """

    rounding: str = "nearest"
    by_group = True

    def fit(self, x: Array, element: Element) -> Scaling:
        largest = group_maxima(x)
        of_element = math.floor(math.log2(element.largest))
        last = element.largest / 2**of_element  # in [1, 2), as the mantissa below
        bits = lax.bitcast_convert_type(largest, jnp.int32)
        mantissa = lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
        limit = {"floor": 2.0, "nearest": (last + 2) / 2, "up": last}[self.rounding]
        above = mantissa > limit if self.rounding == "up" else mantissa >= limit
        code = (bits >> 23) - of_element + above.astype(jnp.int32)
        code = jnp.where(jnp.isfinite(largest), jnp.clip(code, 1, 254), 255)
        return Scaling(code.astype(jnp.uint8))

    def covering(self) -> "PowerOfTwo":
        return PowerOfTwo("up")

    def scale(self, scaling: Scaling) -> Array:
        code = scaling.scales.astype(jnp.int32)
        return jnp.where(
            code == 255, jnp.nan, lax.bitcast_convert_type(jnp.maximum(code, 1) << 23, jnp.float32)
        )


@dataclasses.dataclass(frozen=True)
class RoundedAbsMax:
    """Scales of `AbsMax`, rounded to a minifloat and stored as its codes in 8 bits.

    Values outside of that format's range need scales of their own around them: see `TwoLevel`.

    Attributes:
      element: the scales' format, which has a NaN (`reserved`) for groups that are not finite.
      rounding: of the scales: "nearest", or "up", so that no group's largest value is out of range.

    Raises:
      ValueError: the element has no NaN, or the rounding another name.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> e4m3, fp4 = (frugax.formats.format_named(name).element for name in ("fp8_e4m3", "fp4_e2m1"))
        >>> scheme = frugax.formats.RoundedAbsMax(e4m3)
        >>> scheme.scale(scheme.fit(jnp.array([[6.0, 1.0], [1.0, 0.6]]), fp4)).tolist()
        [1.0, 0.171875]
    """

    element: Minifloat
    rounding: str = "nearest"
    by_group = True

    def __post_init__(self) -> None:
        if not (isinstance(self.element, Minifloat) and self.element.reserved):
            raise ValueError(f"element: got {self.element}; expected a Minifloat with a NaN")
        if self.rounding not in ("nearest", "up"):
            raise ValueError(f"rounding: got {self.rounding!r}; expected 'nearest' or 'up'")

    def fit(self, x: Array, element: Element) -> Scaling:
        wanted = group_maxima(x) * (1 / element.largest)
        codes = rounded_codes(wanted, self.element, self.rounding)
        # No code is that of an infinity or a NaN to `encode`; the last one is a NaN.
        return Scaling(jnp.where(jnp.isfinite(wanted), codes, self.element.highest).astype(jnp.uint8))

    def covering(self) -> "RoundedAbsMax":
        return dataclasses.replace(self, rounding="up")

    def scale(self, scaling: Scaling) -> Array:
        return self.element.decode(scaling.scales.astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class TwoLevel:
    """Scales of `AbsMax`, coded in 8 bits under a float32 scale of their own.

    Attributes:
      element: of the scales' codes: unsigned, or signed if a mean is taken off.
      block: scales that share an outer one, along the matrix's other axis; None: all of a matrix.
      centred: whether the mean over the matrix is taken off first.
      by_column: whether each column's scales have an outer one, in place of the matrix.
      rounding: of the scales: "nearest", or "up", so that no group's largest value is out of range.

    Source: NVIDIA's NVFP4 (block None); Dettmers et al. 2023, QLoRA (arXiv 2305.14314): double quantization;
    Dai et al. 2021, VS-Quant (arXiv 2102.04503): by columns.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> nvfp4 = frugax.formats.format_named("nvfp4")
        >>> scaling = nvfp4.fit(jnp.array([[6.0, 1.0], [1.0, 3.0]]))
        >>> nvfp4.scale(scaling).tolist(), scaling.scales.codes.dtype.name
        ([1.0, 0.5], 'uint8')
    """

    element: Element
    block: int | None = None
    centred: bool = False
    by_column: bool = False
    rounding: str = "nearest"
    by_group = False

    def fit(self, x: Array, element: Element) -> Scaling:
        wanted = finite_or_nan(group_maxima(x) * (1 / element.largest))
        matrix = (-1,) if self.by_column else (-1, -2)[: wanted.ndim]
        offset = jnp.mean(wanted, matrix, keepdims=True) if self.centred else None
        rest = wanted if offset is None else wanted - offset
        if self.block is None:
            outer = jnp.max(jnp.abs(rest), matrix, keepdims=True)
        else:
            outer = _across(group_maxima(split(_across(jnp.abs(rest)), self.block)))
        outer = outer * (1 / self.element.largest)
        unit = rest / never_zero(self._spread(outer, rest))
        codes = rounded_codes(unit, self.element, self.rounding)
        return Scaling(CodedScales(codes.astype(jnp.uint8), outer, offset, self.element, self.block))

    def covering(self) -> "TwoLevel":
        return dataclasses.replace(self, rounding="up")

    def scale(self, scaling: Scaling) -> Array:
        stored = scaling.scales
        value = self.element.decode(stored.codes.astype(jnp.int32))
        value = value * self._spread(stored.outer, stored.codes)
        return value if stored.offset is None else value + stored.offset

    def _spread(self, outer: Array, scales: Array) -> Array:
        """`outer` for every scale."""
        if self.block is None:
            return outer
        return _across(spread(_across(outer), self.block, _across(scales).shape[-1]))


def rounded_codes(x: Array, element: Element, rounding: str) -> Array:
    """The codes of the nearest values, or of the nearest above ("up")."""
    codes = element.encode(x)
    if rounding == "nearest":
        return codes
    above = element.next(codes, jnp.full(codes.shape, True))
    return jnp.where(element.decode(codes) < x, above, codes)


def split(x: Array, group_size: int) -> Array:
    """Cut the last axis in groups, [..., n] -> [..., ceil(n / group_size), group_size]; zeros fill up."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % group_size)])
    return x.reshape(*x.shape[:-1], -1, group_size)


def spread(scales: Array, group_size: int, n: int) -> Array:
    """Repeat each group's scale [..., groups] for its elements [..., n]."""
    return jnp.repeat(scales, group_size, axis=-1)[..., :n]


def group_maxima(x: Array) -> Array:
    """The largest magnitude of each group, [..., G, g] -> [..., G]."""
    return jnp.max(jnp.abs(x), axis=-1)


def finite_or_nan(scale: Array) -> Array:
    """Scales in which an infinity is NaN, so that each value of its group is."""
    return jnp.where(jnp.isfinite(scale), scale, jnp.nan)


def never_zero(scale: Array) -> Array:
    """Scales to divide by: of a group whose scale is zero, 1."""
    return jnp.where(scale == 0, 1.0, scale)


def _across(x: Array) -> Array:
    """Swap the axis of groups with the matrix's other one; a vector has none."""
    return x if x.ndim == 1 else jnp.swapaxes(x, -1, -2)
