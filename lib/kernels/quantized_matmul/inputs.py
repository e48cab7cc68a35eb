"""The checked call of `quantized_matmul` and its static description: the form that every backend takes."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import Array

from ...formats import (
    AbsMax,
    Bipolar,
    CodedScales,
    Format,
    Integer,
    QuantizedTensor,
    check_storage,
    format_named,
)
from ..common.arguments import known, reject

Method = Literal["dot", "planes", "lut", "lut_int8"]
METHODS: tuple[str, ...] = get_args(Method)
INDEPENDENT = ("m", "n")


class Inputs(NamedTuple):
    """The arrays as they are stored, None where a format has none; W has G groups of rows."""

    x: Array  # [M, K], float
    codes: Array  # [rows of packed codes, N]; one row a code at 8 bits
    scales: Array  # [G, N]: float32 or bfloat16, or codes of scales (uint8)
    zeros: Array | None  # [G, N], uint8: subtracted from values before scaling
    outer: Array | None  # float32 []: what multiplies decoded scales
    offset: Array | None  # float32 []: what is added to scales after that
    choices: Array | None  # [ceil(G / 4), N], uint8: which codebooks four groups have
    bias: Array | None  # [N], float


@dataclass(frozen=True)
class MixedActivations:
    """Activations in blocks of channels: the first few blocks in more bits, all others in fewer.

    A token has a scale for each block. `frugax.quant.outlier_permutation` puts channels with outliers first.

    Attributes:
      high_blocks: how many blocks, from the first channel on, are stored in `high`.
      high, low: formats, or their names.
      block: channels of a block; the last block may have fewer.

    Source: Liu et al. 2024, COMET (arXiv 2410.12168).

    Example:
        >>> import frugax
        >>> frugax.kernels.MixedActivations(high_blocks=2)
        MixedActivations(high_blocks=2, high='int8', low='int4', block=128)
    """

    high_blocks: int
    high: Format | str = "int8"
    low: Format | str = "int4"
    block: int = 128


class Spec(NamedTuple):
    """Everything of a call that is not an array; hashable."""

    format: Format
    group_size: int  # rows of W that share a scale; at most K
    K: int  # rows of W
    activations: Format | MixedActivations | None  # of each token; None: x is multiplied as it is
    method: str  # one of METHODS; kernels serve "dot"


def check(
    x: Array,
    w: QuantizedTensor,
    bias: Array | None,
    activations: Format | str | MixedActivations | None,
    method: str | None,
) -> tuple[Inputs, Spec]:
    """Raise ValueError naming the argument that can't be right, or return the checked call.

    Args:
      x: [..., K].
      w: [K, N], cut in groups along K.
      bias: [N].
      activations: how each token is quantized.
      method: how products are computed; None: "dot".
    """
    if not isinstance(w, QuantizedTensor):
        raise ValueError(f"w: got {type(w).__name__}; expected a QuantizedTensor (frugax.formats.quantize)")
    if w.ndim != 2 or w.axis != -2:
        axis = w.axis if w.axis < 0 else w.axis - w.ndim
        got = f"{w.format.name}{list(w.shape)} in groups along axis {axis}"
        raise ValueError(f"w: got {got}; expected [K, N] in groups along axis 0")
    check_storage(w)
    K, N = w.shape
    if not jnp.issubdtype(x.dtype, jnp.floating):
        reject("x", x, "a floating dtype")
    if x.ndim == 0 or x.shape[-1] != K:
        reject("x", x, f"[..., {K}] for w {[K, N]}")
    if any(known(size) and size == 0 for size in (*x.shape, N)):
        reject("x", x, "every size >= 1")
    if bias is not None and (not jnp.issubdtype(bias.dtype, jnp.floating) or bias.shape != (N,)):
        reject("bias", bias, f"floats [{N}]")
    if method is not None and method not in METHODS:
        raise ValueError(f"method: got {method!r}; expected {', '.join(map(repr, METHODS))} or None")
    arrays, format, group_size = stored(w)
    given = _activations(activations, K, group_size)
    spec = Spec(format, group_size, K, given, method or "dot")
    _check_method(spec)
    return Inputs(x=x.reshape(-1, K), **arrays, bias=bias), spec


def stored(w: QuantizedTensor) -> tuple[dict[str, Any], Format, int]:
    """The arrays of a tensor [K, N] by their names in `Inputs`, its format, and rows that share a scale.

    Scales whose own scales lie across columns (double quantization) or differ by column become floats here: a
    shard of the columns could not tell which are its own.
    """
    K, N = w.shape
    format, scales, group_size = w.format, w.scales, w.group_size
    outer = offset = None
    if isinstance(scales, CodedScales) and (scales.block is not None or scales.outer.size > 1):
        scales = format.scale(w.scaling()).T
        format = replace(format, scheme=AbsMax())
    elif isinstance(scales, CodedScales):
        outer, offset = (None if x is None else x.reshape(()) for x in (scales.outer, scales.offset))
        scales = scales.codes
    elif scales.shape[0] != -(-K // group_size) or scales.shape[1] != N:  # one for the whole matrix
        scales, group_size = jnp.broadcast_to(scales, (1, N)), K
    arrays = {"codes": w.codes, "scales": scales, "zeros": w.zeros, "outer": outer, "offset": offset}
    return arrays | {"choices": w.choices}, format, group_size


def weights(call: Inputs, spec: Spec) -> QuantizedTensor:
    """The tensor [K, N] that `stored` was given."""
    scales: Any = call.scales
    if call.outer is not None:
        outer, offset = (None if x is None else x.reshape(1, 1) for x in (call.outer, call.offset))
        scales = CodedScales(scales, outer, offset, spec.format.scheme.element, None)
    padding = call.codes.shape[0] * 8 // spec.format.bits - spec.K
    return QuantizedTensor(
        call.codes, scales, spec.format, -2, spec.group_size, padding, call.zeros, call.choices
    )


def largest_whole(format: Format) -> int | None:
    """The largest magnitude of a format's values less zeros; None where they are not all whole numbers."""
    return int(format.element.largest) if isinstance(format.element, Integer | Bipolar) else None


def _activations(given: Any, K: int, group_size: int) -> Format | MixedActivations | None:
    if given is None:
        return None
    if not isinstance(given, MixedActivations):
        format = _activation_format("activations", given)
        _check_block(format.group_size or K, K, group_size)
        return format
    _check_block(given.block, K, group_size)
    blocks = -(-K // given.block)
    if not 0 <= given.high_blocks <= blocks:
        got = f"high_blocks={given.high_blocks}"
        raise ValueError(f"activations: got {got}; expected 0 to {blocks} for K={K}")
    high, low = (_activation_format(f"activations.{n}", getattr(given, n)) for n in ("high", "low"))
    return MixedActivations(given.high_blocks, high, low, given.block)


def _activation_format(name: str, given: Format | str) -> Format:
    format = format_named(given)
    if not format.scheme.by_group:
        raise ValueError(
            f"{name}: got {format.name}; expected a format in which each token has its own scale"
        )
    return format


def _check_block(block: int, K: int, group_size: int) -> None:
    """Channels of a token that share a scale, and rows of W that do, must not overlap by parts."""
    if block < 1 or not (block % group_size == 0 or group_size % block == 0 or max(block, group_size) >= K):
        expected = f"a multiple or a divisor of w's group_size {group_size}"
        raise ValueError(f"activations: got blocks of {block} channels; expected {expected}")


def _check_method(spec: Spec) -> None:
    formats = {"w": spec.format, "activations": spec.activations}
    if spec.method == "planes":
        for name, format in formats.items():
            if not isinstance(format, Format) or not isinstance(format.element, Bipolar):
                got = getattr(format, "name", format)
                raise ValueError(f"method: got 'planes' with {name} {got}; expected bipolar formats of both")
    if spec.method.startswith("lut") and largest_whole(spec.format) is None:
        raise ValueError(
            f"method: got {spec.method!r} for w {spec.format.name}; expected integers or bipolar"
        )


def argument_axes(call: Inputs, spec: Spec) -> Inputs:
    """The axes of every array: tokens and columns of W may be split, its rows are whole."""

    def axes(name: str, x: Array | None) -> str | None:
        if x is None:
            return None
        return " ".join((*(f"{name}{i}" for i in range(x.ndim - 1)), "n")) if x.ndim else ""

    rest = (axes(name, getattr(call, name)) for name in Inputs._fields[1:])
    return Inputs("m k", *rest)


def result_axes(call: Inputs, spec: Spec) -> str:
    """The axes of the product."""
    return "m n"
