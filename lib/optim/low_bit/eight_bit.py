"""Optimizers with moments in 8 bits: drop-ins for optax's own.

A leaf of n numbers in rows of C keeps, for each moment, n bytes of codes in its own shape (so that its
sharding applies) and 4 bytes for each of the ceil(C / group_size) groups of a row: 2.03 bytes a parameter for
Adam with groups of 256, instead of 8, and 2.06 with groups of 128. A step works on a block at a time
(`frugax.kernels.quantized_update`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from ...formats import Format, QuantizedTensor, above_zero, format_named
from ...kernels.quantized_update import quantized_update
from ...kernels.quantized_update.rules import RULES, scalars
from ..common.containers import named_leaves, without_variables
from .quantized import quantized_state

Scalar = float | Array  # an array where `optax.inject_hyperparams` traces it


@dataclasses.dataclass(frozen=True)
class EightBit:
    """The storage of moments. One value, because `optax.inject_hyperparams` would trace bare numbers.

    Args:
      group_size: elements that share a scale (a row, if that is shorter). The paper has 2048; smaller costs
        little and is more exact. None: 256, or 128 in a leaf whose rows are whole groups only of 128, since
        the kernels serve whole ones.
      min_size: leaves with fewer numbers stay in float32, as published.
      full_precision: a leaf's path, such as "decoder/embed/embedding" -> whether it stays in float32.
      signed: the format of moments that may be negative. "mulaw8" is about as exact as the paper's
        "dynamic8" down to a thousandth of a group's largest number, for half the work; that reaches to a
        millionth.
      unsigned: the format of second moments: "ufp8_e4m4", or the paper's "udynamic8". They are squares, so
        of gradients they see half as many digits: Adam's update is within a tenth of the exact one where
        gradients have at least 1/200 of their group's largest, and smaller than the exact one below that (a
        quarter at a thousandth). With the paper's two formats it is within a third down to 1/500. In the
        place of "udynamic8", in which small moments would become zero, comes "udynamic8_positive".
      backend: of `frugax.kernels.quantized_update`.

    Example:
        >>> import frugax
        >>> frugax.optim.EightBit(group_size=2048, full_precision=frugax.optim.is_embedding).min_size
        4096
    """

    group_size: int | None = None
    min_size: int = 4096
    full_precision: Callable[[str], bool] | None = None
    signed: Format | str = "mulaw8"
    unsigned: Format | str = "ufp8_e4m4"
    backend: str | None = None

    def __post_init__(self):
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size: got {self.group_size}; expected at least 1")
        for name in ("signed", "unsigned"):
            if format_named(getattr(self, name)).bits != 8:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a format of 8 bits")
        above_zero(self.unsigned)

    def group_size_of(self, row: int) -> int:
        """The number of elements that share a scale, in a row of `row` elements."""
        size = self.group_size
        if size is None:
            size = 128 if row % 256 and row % 128 == 0 else 256
        return min(size, row)


def is_embedding(path: str) -> bool:
    """Test if a path ends in "embedding", as Flax's and frugax's embedding tables do.

    Args:
      path: names joined by "/".

    Example:
        >>> import frugax
        >>> frugax.optim.is_embedding("decoder/embed/embedding")
        True
    """
    return path.split("/")[-1] == "embedding"


class EightBitState(NamedTuple):
    """Steps done, and each moment: the tree of params with a `QuantizedTensor`, or float32, for each leaf."""

    count: Int[Array, ""]  # type: ignore[assignment]  # a tuple's method, as in optax's states
    moments: tuple[Any, ...]


def scale_by_adam_8bit(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8, *, moments: EightBit = EightBit()
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with both moments in 8 bits.

    Args:
      b1, b2: decays of the moments.
      eps: added to the root of the second moment.
      moments: how they are stored.

    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> state = frugax.optim.scale_by_adam_8bit().init({"w": jnp.zeros((64, 256))})
        >>> state.moments[0]["w"].nbytes
        16640
    """
    return _scale_by(
        "adam",
        lambda t: (b1, b2, eps, _unbiasing(b1, t), _unbiasing(b2, t)),
        (moments.signed, above_zero(moments.unsigned)),
        moments,
    )


def adam_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    moments: EightBit = EightBit(),
) -> optax.GradientTransformation:
    """`optax.adam` with both moments in 8 bits: `adamw_8bit` without weight decay.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps: as in `optax.adam`.
      moments: how they are stored.

    Source: Dettmers et al. 2022 (arXiv 2110.02861).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"w": jnp.zeros((64, 256))}
        >>> tx = frugax.optim.adam_8bit(1e-3)
        >>> updates, state = tx.update({"w": jnp.ones((64, 256))}, tx.init(params), params)
        >>> round(float(updates["w"][0, 0]), 4)
        -0.001
    """
    return optax.chain(
        scale_by_adam_8bit(b1, b2, eps, moments=moments), optax.scale_by_learning_rate(learning_rate)
    )


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-4,
    mask: Any = None,
    *,
    moments: EightBit = EightBit(),
) -> optax.GradientTransformation:
    """`optax.adamw` with both moments in 8 bits.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps: as in `optax.adamw`.
      weight_decay: decoupled, multiplied with the learning rate.
      mask: which leaves decay: a tree of bools, or a function of params to one. None: all.
      moments: how they are stored.

    Source: Dettmers et al. 2022 (arXiv 2110.02861).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"w": jnp.ones((64, 256))}
        >>> tx = frugax.optim.adamw_8bit(1e-3, weight_decay=0.1)
        >>> updates, state = tx.update({"w": jnp.ones((64, 256))}, tx.init(params), params)
        >>> round(float(updates["w"][0, 0]), 4)
        -0.0011
    """
    return optax.chain(
        scale_by_adam_8bit(b1, b2, eps, moments=moments),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    weight_decay: Scalar = 1e-3,
    mask: Any = None,
    *,
    moments: EightBit = EightBit(),
) -> optax.GradientTransformation:
    """`optax.lion` with its momentum in 8 bits.

    Args:
      learning_rate: a number or a schedule.
      b1, b2: the share of the momentum in the update, and its decay.
      weight_decay, mask: as in `adamw_8bit`.
      moments: how they are stored.

    Source: Chen et al. 2023 (arXiv 2302.06675); Dettmers et al. 2022 (arXiv 2110.02861).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"w": jnp.zeros((64, 256))}
        >>> tx = frugax.optim.lion_8bit(1e-3)
        >>> updates, state = tx.update({"w": jnp.ones((64, 256))}, tx.init(params), params)
        >>> round(float(updates["w"][0, 0]), 4)
        -0.001
    """
    return optax.chain(
        _scale_by("lion", lambda t: (b1, b2), (moments.signed,), moments),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def sgdm_8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.9,
    nesterov: bool = False,
    *,
    moments: EightBit = EightBit(),
) -> optax.GradientTransformation:
    """`optax.sgd` with its momentum in 8 bits.

    Args:
      learning_rate: a number or a schedule.
      momentum: its decay.
      nesterov: look ahead.
      moments: how it is stored.

    Source: Dettmers et al. 2022 (arXiv 2110.02861).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"w": jnp.zeros((64, 256))}
        >>> tx = frugax.optim.sgdm_8bit(0.1)
        >>> updates, state = tx.update({"w": jnp.ones((64, 256))}, tx.init(params), params)
        >>> round(float(updates["w"][0, 0]), 4)
        -0.1
    """
    rule = "nesterov" if nesterov else "momentum"
    return optax.chain(
        _scale_by(rule, lambda t: (momentum,), (moments.signed,), moments),
        optax.scale_by_learning_rate(learning_rate),
    )


def adafactor_8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.9,
    decay_rate: Scalar = 0.8,
    clipping_threshold: Scalar = 1.0,
    weight_decay: Scalar = 0.0,
    *,
    moments: EightBit = EightBit(),
) -> optax.GradientTransformation:
    """Adafactor with its momentum in 8 bits (its second moment is factored already).

    Args:
      learning_rate: a number or a schedule, in units of each leaf's rms.
      momentum: decay of the first moment.
      decay_rate: exponent of the second moment's decay, 1 - t^-decay_rate.
      clipping_threshold: the largest rms of an update.
      weight_decay: added to the update as it is.
      moments: how the momentum is stored (`group_size`, `min_size` and `signed` count).

    Source: Shazeer and Stern 2018 (arXiv 1804.04235); 8 bits as in Dettmers et al. 2022 (arXiv 2110.02861).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> tx = frugax.optim.adafactor_8bit(1e-2)
        >>> state = tx.init({"w": jnp.ones((256, 256))})
        >>> state[4].ema["w"].nbytes
        66560
    """
    ema = optax.ema(momentum, debias=False)
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=decay_rate),
        optax.clip_by_block_rms(clipping_threshold),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        optax.scale_by_param_block_rms(),
        quantized_state(ema, moments.signed, group_size=moments.group_size or 256, min_size=moments.min_size),
        optax.add_decayed_weights(weight_decay),
        optax.scale(-1),
    )


def _scale_by(
    rule: str, hyper: Callable[[Array], tuple], formats: tuple[Format | str, ...], how: EightBit
) -> optax.GradientTransformation:
    """A rule of `quantized_update` over a tree; leaves kept in float32 take the same rule."""

    def init(params):
        leaves, tree = named_leaves(params), jax.tree.structure(params)
        names = ["/".join(path) for path, _ in leaves]
        for name, (_, p) in zip(names, leaves, strict=True):
            if not jnp.issubdtype(p.dtype, jnp.floating):
                raise ValueError(f"params: got {p.dtype}{list(p.shape)} at {name}; expected a floating dtype")
        whole = [how.full_precision is not None and how.full_precision(name) for name in names]
        if leaves and how.full_precision is not None and not any(whole):
            raise ValueError(f"full_precision: matches none of {', '.join(names)}")

        def zeros(p, is_whole, format):
            if is_whole or p.size < how.min_size or p.ndim == 0:
                return jnp.zeros_like(p, jnp.float32)
            return _zeros(p, format_named(format), how.group_size_of(p.shape[-1]))

        moments = tuple(
            tree.unflatten([zeros(p, w, format) for (_, p), w in zip(leaves, whole, strict=True)])
            for format in formats
        )
        return EightBitState(jnp.zeros((), jnp.int32), moments)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        now = hyper(count)
        grads, tree = jax.tree.flatten(updates)
        stored, trees = zip(*(jax.tree.flatten(m, is_leaf=_is_codes) for m in state.moments), strict=True)
        results = []
        for g, *moments in zip(grads, *stored, strict=True):
            if _is_codes(moments[0]):
                results.append(quantized_update(rule, g, tuple(moments), now, backend=how.backend))
            else:
                u, moments = RULES[rule].apply(g.astype(jnp.float32), tuple(moments), list(scalars(now)))
                results.append((u.astype(g.dtype), moments))
        new = tuple(kind.unflatten([m[i] for _, m in results]) for i, kind in enumerate(trees))
        return tree.unflatten([u for u, _ in results]), EightBitState(count, new)

    return without_variables(optax.GradientTransformation(init, update))


def _is_codes(x: Any) -> bool:
    return isinstance(x, QuantizedTensor)


def _unbiasing(b: Scalar, t: Array) -> Array:
    """1 / (1 - b^t), with as many digits for b near 1 as b has."""
    log = jnp.log(b) if isinstance(b, jax.Array) else math.log(b) if b else -math.inf
    return -1 / jnp.expm1(t * log)


def _zeros(p: Array, format: Format, group_size: int) -> QuantizedTensor:
    element = format.element
    zero = element.encode(jnp.zeros((), jnp.float32)).astype(element.code_dtype)
    codes = jnp.full_like(p, zero, dtype=element.code_dtype)
    groups = -(-p.shape[-1] // group_size)
    scales = jnp.zeros((*p.shape[:-1], groups), jnp.float32)
    return QuantizedTensor(codes, scales, format, -1, group_size)
