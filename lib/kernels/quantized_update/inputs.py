"""The checked call of `quantized_update` is, once checked: the form that every backend takes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ...formats import AbsMax, Element, Format, QuantizedTensor
from ...formats.lookup import Lookup
from ..common.arguments import known, reject
from .rules import RULES, scalars

# Rows, then what stacks them, then groups: where nothing says how a leaf is split, rows are guessed first.
_LEADING = tuple(f"a{i}" for i in range(8))
INDEPENDENT = (*_LEADING, "n")


class Inputs(NamedTuple):
    """The arrays. Where groups fill rows, [..., C] is seen as [..., N, G], so that N may be split."""

    grad: Array  # [..., N, G], or [..., C] where the last group is short
    codes: tuple[Array, ...]  # of each moment, like grad
    scales: tuple[Array, ...]  # of each moment, float32 [..., N]
    hyper: Array  # float32 [2 * len(rule.hyper)], see `rules.scalars`


class Spec(NamedTuple):
    """Everything that does not change from step to step."""

    rule: str
    elements: tuple[Element | Lookup, ...]  # tables of one, where those are faster
    group_size: int
    ragged: bool  # the last group of a row is short


def check(rule: str, grad: Array, moments: tuple[QuantizedTensor, ...], hyper) -> tuple[Inputs, Spec]:
    """Raise ValueError naming the argument that can't be right, or return the checked call."""
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}; expected one of {', '.join(RULES)}")
    wanted = RULES[rule]
    if not jnp.issubdtype(grad.dtype, jnp.floating) or grad.ndim == 0 or 0 in grad.shape:
        reject("grad", grad, "a floating dtype, at least one axis, every size >= 1")
    if not all(known(size) for size in grad.shape):
        reject("grad", grad, "sizes that are numbers, as moments have")
    if len(moments) != wanted.moments:
        raise ValueError(f"moments: got {len(moments)}; expected {wanted.moments} for {rule!r}")
    if len(hyper) != len(wanted.hyper):
        raise ValueError(f"hyper: got {len(hyper)} numbers; expected {', '.join(wanted.hyper)} for {rule!r}")
    group_size = moments[0].group_size
    for i, m in enumerate(moments):
        if m.shape != grad.shape or m.axis != -1 or not _one_scale_a_group(m.format):
            got = f"{m.format.name}{list(m.shape)} along axis {m.axis}"
            fits = f"8 bits, float32 scales, grad's shape {list(grad.shape)}, groups along the last axis"
            raise ValueError(f"moments[{i}]: got {got}; expected {fits}")
        if m.group_size != group_size:
            raise ValueError(
                f"moments[{i}]: got groups of {m.group_size}; expected moments[0]'s {group_size}"
            )
    C = grad.shape[-1]
    codes, scales = tuple(m.codes for m in moments), tuple(m.scales for m in moments)
    ragged = C % group_size != 0
    if not ragged:
        groups = (*grad.shape[:-1], C // group_size, group_size)
        grad, codes = grad.reshape(groups), tuple(c.reshape(groups) for c in codes)
    spec = Spec(rule, tuple(m.format.element for m in moments), group_size, ragged)
    return Inputs(grad, codes, scales, scalars(hyper)), spec


def _one_scale_a_group(format: Format) -> bool:
    return format.bits == 8 and format.scheme == AbsMax()


def argument_axes(call: Inputs, spec: Spec) -> Inputs:
    """The axes of every array: rows, and whole groups, may be split."""
    wide, scale, k = *_wide_and_scale(call, spec), len(call.codes)
    return Inputs(wide, (wide,) * k, (scale,) * k, "hyper")


def result_axes(call: Inputs, spec: Spec) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The axes of the update, the codes and the scales."""
    wide, scale, k = *_wide_and_scale(call, spec), len(call.codes)
    return wide, (wide,) * k, (scale,) * k


def _wide_and_scale(call: Inputs, spec: Spec) -> tuple[str, str]:
    leading = _LEADING[: call.scales[0].ndim - 1][::-1]
    wide = " ".join((*leading, "whole") if spec.ragged else (*leading, "n", "g"))
    return wide, " ".join((*leading, "groups" if spec.ragged else "n"))
