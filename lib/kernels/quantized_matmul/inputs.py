"""The checked call of `quantized_matmul` and its static description: the form that every backend takes."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import Array

from ...formats import Format, QuantizedTensor, format_named
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
    outer: Array | None  # float32: what multiplies decoded scales, [] or [blocks, N]
    offset: Array | None  # float32: what is added to scales after that, [] or [blocks, N]
    choices: Array | None  # [G, N], uint8: which codebook a group has
    bias: Array | None  # [N], float


@dataclass(frozen=True)
class MixedActivations:
    """Activations in blocks of channels: the first few blocks in more bits, all others in fewer.

    A token has a scale for each block. Channels with outliers come first (`outlier_permutation`).

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
    spec = Spec(w.format, w.group_size, K, _activations(activations, K, w.group_size), method or "dot")
    return Inputs(x=x.reshape(-1, K), **stored(w), bias=bias), spec


def stored(w: QuantizedTensor) -> dict[str, Any]:
    """The arrays of a tensor [K, N], by their names in `Inputs`."""
    others = ("zeros", "outer", "offset", "choices")
    return {"codes": w.codes, "scales": w.scales, **{name: getattr(w, name, None) for name in others}}


def weights(call: Inputs, spec: Spec) -> QuantizedTensor:
    """The tensor [K, N] that `stored` was given."""
    rows = call.codes.shape[0] * 8 // spec.format.bits
    arrays = {name: getattr(call, name) for name in Inputs._fields[1:-1]}
    given = {name: x for name, x in arrays.items() if x is not None}
    return QuantizedTensor(
        **given, format=spec.format, axis=-2, group_size=spec.group_size, padding=rows - spec.K
    )


def _activations(given: Any, K: int, group_size: int) -> Format | MixedActivations | None:
    if given is None:
        return None
    if not isinstance(given, MixedActivations):
        return _activation_format("activations", given)
    if given.block < 1 or (given.block % group_size and group_size % given.block):
        raise ValueError(
            f"activations: got blocks of {given.block} channels; expected a multiple or a divisor of w's "
            f"group_size {group_size}"
        )
    blocks = -(-K // given.block)
    if not 0 <= given.high_blocks <= blocks:
        got = f"high_blocks={given.high_blocks}"
        raise ValueError(f"activations: got {got}; expected 0 to {blocks} for K={K}")
    high, low = (_activation_format(f"activations.{n}", getattr(given, n)) for n in ("high", "low"))
    return MixedActivations(given.high_blocks, high, low, given.block)


def _activation_format(name: str, given: Format | str) -> Format:
    format = format_named(given)
    if format.bits > 8:
        raise ValueError(f"{name}: got {format.name}; expected a format of at most 8 bits")
    return format


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
