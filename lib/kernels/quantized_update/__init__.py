"""A step of an elementwise optimizer on 8-bit moments: the public function."""

from collections.abc import Sequence

from jaxtyping import Array, Float

from ...formats import QuantizedTensor
from ..common.arguments import as_shaped
from ..common.operation import Backend, Operation
from .inputs import INDEPENDENT, argument_axes, check, result_axes

OPERATION = Operation(
    "quantized_update", argument_axes, result_axes, independent=INDEPENDENT, static=("spec",)
)


def quantized_update(
    rule: str,
    grad: Float[Array, "*shape"],
    moments: tuple[QuantizedTensor, ...],
    hyper: Sequence[float | Float[Array, ""]],
    *,
    backend: Backend | None = None,
) -> tuple[Float[Array, "*shape"], tuple[QuantizedTensor, ...]]:
    """Dequantize moments, take one step of an optimizer, and quantize them again, block by block.

    Args:
      rule: "adam", "lion", "momentum" or "nesterov".
      grad: the gradient, at least one axis.
      moments: of grad's shape, 8 bits, groups along the last axis: (m, v) for "adam", (m,) for the others.
      hyper: the rule's scalars, which may be traced: (b1, b2, eps, 1 / (1 - b1^t), 1 / (1 - b2^t)) for
        "adam", (b1, b2) for "lion", (decay,) for "momentum" and "nesterov".
      backend: None picks by the platform the program is lowered for; or "reference", "xla", "pallas_tpu",
        "pallas_gpu". A Pallas backend named on CPU runs interpreted.

    Returns:
      The update (what a learning rate is to be multiplied with) in grad's dtype, and the new moments. Moments
      are never whole in float32: a chunk at a time is dequantized. A group of which a number is not finite
      becomes NaN, as of `frugax.formats.quantize`.

    Raises:
      ValueError: naming the argument that can't be right, or the reason why a named backend can't serve.

    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> m = frugax.formats.quantize(jnp.zeros((8, 512)), "dynamic8", axis=-1, group_size=256)
        >>> update, (m,) = frugax.kernels.quantized_update("momentum", jnp.ones((8, 512)), (m,), (0.9,))
        >>> float(update[0, 0]), m.codes.dtype, m.scales.shape
        (1.0, dtype('uint8'), (8, 2))
    """
    call, spec = check(rule, as_shaped(grad), tuple(moments), hyper)
    update, codes, scales = OPERATION(call, backend, spec=spec)
    new = tuple(
        QuantizedTensor(c.reshape(grad.shape), s, m.format, m.axis, m.group_size)
        for c, s, m in zip(codes, scales, moments, strict=True)
    )
    return update.reshape(grad.shape), new
