"""Number formats for stored tensors: densely packed codes and one scale for each group of them.

A format is a value of this module (`frugax.formats.int4`) or its name (`"int4"`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .dynamic import Dynamic, PositiveDynamic
from .format import Format
from .integer import Integer
from .quantized_tensor import QuantizedTensor, quantize_array
from .segmented import Segmented

int2, int3, int4, int5, int6, int7, int8 = (Integer(f"int{n}", n, True) for n in range(2, 9))
dynamic8 = Dynamic("dynamic8", 8, signed=True)
udynamic8 = Dynamic("udynamic8", 8, signed=False)
udynamic8_positive = PositiveDynamic("udynamic8_positive", 8, signed=False)
mulaw8 = Segmented("mulaw8", 8, signed=True)
ufp8_e4m4 = Segmented("ufp8_e4m4", 8, signed=False)

_BY_NAME = {
    f.name: f
    for f in (
        *(int2, int3, int4, int5, int6, int7, int8),
        *(dynamic8, udynamic8, udynamic8_positive),
        *(mulaw8, ufp8_e4m4),
    )
}

__all__ = ["Format", "QuantizedTensor", "above_zero", "format_named", "quantize"]


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
    if format not in _BY_NAME:
        raise ValueError(f"format: got {format!r}; expected one of {', '.join(_BY_NAME)}")
    return _BY_NAME[format]


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
    key: Key[Array, ""] | None = None,
) -> QuantizedTensor:
    """Store a tensor as codes, with the largest magnitude of each group of them as its scale.

    Args:
      x: a floating array with at least one axis.
      format: a format or its name: int2..int8 (symmetric); dynamic8 and udynamic8 (the dynamic map of 8-bit
        optimizers, udynamic8 for values >= 0, udynamic8_positive for those that must not become 0); mulaw8
        and ufp8_e4m4 (16 steps an octave: as exact, cheaper).
      axis: the axis that is cut into groups; for a matrix, the contracted one. Codes below 8 bits are packed
        along it.
      group_size: elements of a group; the last group may have fewer. None: the whole axis is one group.
      key: PRNG key for stochastic rounding, by which the stored tensor is x on average. None rounds to the
        nearest code.

    Returns:
      A `QuantizedTensor`, with `.dequantize(dtype)` and `.nbytes`: n * bits / 8 for codes, 4 a group.

    Raises:
      ValueError: an argument is invalid; the message names it.

    Source: Dettmers et al. 2022 (arXiv 2110.02861) for block-wise scales and the dynamic map.

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
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size: got {group_size}; expected at least 1, or None")
    return quantize_array(x, format, axis, group_size, key)
