"""Number formats for stored tensors: densely packed codes and one scale for each group of them.

A format is a pair of an element format (codes and their values) and a scale scheme, with a group size. It is
a value or a name (`"int4"`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .bitmod import Mixture, SpecialValue
from .codebook import Codebook
from .element import Element
from .format import Format
from .integer import Bipolar, Integer, Ternary
from .least_squares import LeastSquares
from .minifloat import Minifloat
from .minmax import MinMax, TernaryMinMax
from .named import BY_NAME, udynamic8, udynamic8_positive, ufp8_e4m4
from .olive import Pairs
from .quantized_tensor import QuantizedTensor, check_storage, from_codes, quantize_array
from .scales import (
    AbsMax,
    AbsMean,
    Asymmetric,
    CodedScales,
    MeanMagnitude,
    PowerOfTwo,
    RoundedAbsMax,
    Scaling,
    TwoLevel,
)

__all__ = [
    "AbsMax",
    "AbsMean",
    "Asymmetric",
    "Bipolar",
    "Codebook",
    "CodedScales",
    "Element",
    "Format",
    "Integer",
    "LeastSquares",
    "MeanMagnitude",
    "MinMax",
    "Minifloat",
    "Mixture",
    "Pairs",
    "PowerOfTwo",
    "QuantizedTensor",
    "RoundedAbsMax",
    "Scaling",
    "SpecialValue",
    "Ternary",
    "TernaryMinMax",
    "TwoLevel",
    "above_zero",
    "check_storage",
    "fake_quantize",
    "format_named",
    "from_codes",
    "quantize",
]


def __getattr__(name: str) -> Format:
    """Give the format of a name: `frugax.formats.int4`."""
    if name in BY_NAME:
        return BY_NAME[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def format_named(format: Format | str) -> Format:
    """Look up a format by its name; a format is returned as it is.

    Args:
      format: a format, or the name of one of this module's.

    Raises:
      ValueError: no format has this name.

    Example:
        >>> import frugax
        >>> frugax.formats.format_named("int4").bits
        4
    """
    if isinstance(format, Format):
        return format
    if not isinstance(format, str) or format not in BY_NAME:
        raise ValueError(f"format: got {format!r}; expected one of {', '.join(BY_NAME)}")
    return BY_NAME[format]


def above_zero(format: Format | str) -> Format:
    """Find the format in which to store a second moment: no positive number becomes zero in it.

    Args:
      format: a format without negative values; in the place of "udynamic8" comes "udynamic8_positive".

    Raises:
      ValueError: small numbers become zero in this format.

    Example:
        >>> import frugax
        >>> frugax.formats.above_zero("udynamic8").name, frugax.formats.above_zero("ufp8_e4m4").name
        ('udynamic8_positive', 'ufp8_e4m4')
    """
    format = format_named(format)
    if format == udynamic8:
        return udynamic8_positive
    if format not in (udynamic8_positive, ufp8_e4m4):
        raise ValueError(
            f"format: got {format.name} for a second moment, in which small ones become zero and updates too "
            "large; expected ufp8_e4m4 or udynamic8"
        )
    return format


def quantize(
    x: Float[Array, "..."],
    format: Format | str,
    *,
    axis: int = 0,
    group_size: int | None = None,
    rounding: str = "nearest",
    key: Key[Array, ""] | None = None,
    partial_group: bool = True,
) -> QuantizedTensor:
    """Store a tensor as codes and what its format keeps for each group of them.

    Args:
      x: a floating array with at least one axis. A group with a NaN or an infinity becomes NaN, as do all
        that share what its scale is stored under: a matrix in nvfp4 and nf4_dq, a column in bitmod.
      format: a format or its name:
        int1..int8 (symmetric; of 2 to 7 bits, the largest magnitude lies half a step past the largest code),
        uint2..uint8 (asymmetric, with a code of zero), bipolar1..bipolar8 (every bit plane is -1 or 1),
        ternary (one scale a matrix), ternary_minmax (each group's least value, zero, its greatest);
        fp4_e2m1, fp6_e2m3, fp6_e3m2, fp8_e4m3, fp8_e5m2; nf4 (a scale for 64), nf4_dq (its scales in 8 bits);
        with scales of 8 bits mxfp4, mxfp6 (e2m3), mxfp6_e3m2, mxfp8 (e4m3), mxfp8_e5m2, mxint8, nvfp4 and the
        block floating point bfp4, bfp6, bfp8;
        bitmod3, bitmod4 (for each 128, that of four codebooks with the least squared error);
        olive4, olive8 (integers; of a pair with an outlier, the other becomes zero and the outlier a float);
        for optimizers' moments dynamic8 and udynamic8 (udynamic8 for values >= 0, udynamic8_positive for
        those that must not become 0), mulaw8 and ufp8_e4m4 (16 steps an octave: as exact, cheaper).
      axis: the axis that is cut into groups; for a matrix, the contracted one. Codes below 8 bits are packed
        along it.
      group_size: elements of a group. None: the format's own; if it has none, the whole axis is one group.
      rounding: "nearest", or "stochastic": then the stored tensor is x on average.
      key: PRNG key for stochastic rounding.
      partial_group: whether the last group may have fewer elements.

    Returns:
      A `QuantizedTensor`, with `.dequantize(dtype)` and `.nbytes`: n * bits / 8 for codes, and the scales'.

    Raises:
      ValueError: an argument is invalid; the message names it.

    Source: Dettmers et al. 2022 (arXiv 2110.02861) for block-wise scales and the dynamic map; OCP
    Microscaling Formats (MX) Specification 1.0; Dettmers et al. 2023 (arXiv 2305.14314) for nf4; Chen et al.
    2024 (arXiv 2411.11745) for bitmod; Guo et al. 2023 (arXiv 2304.07493) for olive; Frantar & Alistarh 2023
    (arXiv 2310.16795) for ternary_minmax.

    Example:
        >>> import frugax, jax
        >>> x = jax.random.normal(jax.random.key(0), (256, 64))
        >>> q = frugax.formats.quantize(x, "int4", group_size=128)
        >>> q.shape, q.codes.shape, q.scales.shape, q.nbytes
        ((256, 64), (128, 64), (2, 64), 8704)
    """
    format = format_named(format)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: got {x.dtype}{list(x.shape)}; expected a floating dtype")
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"x: got {x.dtype}{list(x.shape)}; expected at least one axis and no empty one")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis: got {axis} for x {list(x.shape)}; expected {-x.ndim}..{x.ndim - 1}")
    elements = format.group_of(group_size, x.shape[axis])
    size = group_size or format.group_size or 1
    if not partial_group and x.shape[axis] % size:
        raise ValueError(
            f"group_size: got {size} for {x.shape[axis]} elements of axis {axis}; expected a divisor, or "
            "partial_group=True"
        )
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding: got {rounding!r}; expected 'nearest' or 'stochastic'")
    if format.paired and (x.shape[axis] % 2 or (group_size or 0) % 2):
        odd = f"group_size: got {group_size}" if (group_size or 0) % 2 else f"x: got {list(x.shape)}"
        raise ValueError(f"{odd}; expected an even number along axis {axis}: {format.name} stores pairs")
    if (key is None) != (rounding == "nearest"):
        raise ValueError(f"key: got {key} with rounding={rounding!r}; expected a key for 'stochastic' alone")
    return quantize_array(x, format, axis, elements, key)


def fake_quantize(
    x: Float[Array, "..."],
    format: Format | str,
    *,
    axis: int = 0,
    group_size: int | None = None,
    rounding: str = "nearest",
    key: Key[Array, ""] | None = None,
) -> Float[Array, "..."]:
    """Round a tensor to the values of a format, with the gradient of no rounding (straight-through).

    Args:
      x: as `quantize` takes it, with the other arguments.

    Returns:
      The dequantized tensor in x's dtype; its gradient goes to x as it is.

    Raises:
      ValueError: as `quantize`.

    Source: Bengio et al. 2013 (arXiv 1308.3432) for the straight-through estimator.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> f = lambda x: frugax.formats.fake_quantize(x, "fp4_e2m1").sum()
        >>> x = jnp.array([6.0, 2.4, 0.1])
        >>> frugax.formats.fake_quantize(x, "fp4_e2m1").tolist(), jax.grad(f)(x).tolist()
        ([6.0, 2.0, 0.0], [1.0, 1.0, 1.0])
    """
    stored = quantize(
        jax.lax.stop_gradient(x), format, axis=axis, group_size=group_size, rounding=rounding, key=key
    )
    return _straight_through(x, stored.dequantize(x.dtype))


@jax.custom_jvp
def _straight_through(x, rounded):
    return rounded


_straight_through.defjvps(lambda dx, _, x, rounded: dx, None)
