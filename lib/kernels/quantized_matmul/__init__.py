"""The product with a matrix stored in few bits: the public function."""

from jaxtyping import Array, Float

from ...formats import Format, QuantizedTensor
from ..common.arguments import as_shaped
from ..common.operation import Backend, Operation
from .inputs import INDEPENDENT, Method, MixedActivations, argument_axes, check, result_axes

OPERATION = Operation(
    "quantized_matmul", argument_axes, result_axes, independent=INDEPENDENT, static=("spec",)
)


def quantized_matmul(
    x: Float[Array, "*rows k"],
    w: QuantizedTensor,
    *,
    bias: Float[Array, "n"] | None = None,
    activations: Format | str | MixedActivations | None = None,
    method: Method | None = None,
    backend: Backend | None = None,
) -> Float[Array, "*rows n"]:
    """Multiply by a matrix that is stored as codes and scales: y = x W + b.

    Args:
      x: the tokens [..., K].
      w: W [K, N] in any format, cut in groups along K: `frugax.formats.quantize(W, "int4", group_size=128)`.
      bias: b, added before y is rounded to x's dtype.
      activations: None multiplies x as it is. A format, such as "int8" or "fp8_e4m3", stores each token in it
        first, with its largest magnitude as scale; codes of integers are then summed in int32 within each
        group of W's rows, and scaled after. `MixedActivations`: COMET's blocks of channels in two formats.
      method: None or "dot": products of values. For the portable form also "planes" (sums of products of bit
        planes, for activations and W in bipolar formats), "lut" and "lut_int8" (T-MAC's sums of four
        activations, looked up by four bits of W; in "lut_int8" the sums are rounded to 8 bits).
      backend: None picks by the platform the program is lowered for; or "reference", "xla", "pallas_tpu",
        "pallas_gpu". A Pallas backend named on CPU runs interpreted.

    Returns:
      y [..., N] in x's dtype. Sums are float32 (float64 if x is), or int32 as said.

    Raises:
      ValueError: naming the argument that can't be right, or the reason why a named backend can't serve.

    Differentiable in x and bias; W is a constant. Gradients pass straight through activations' rounding.
    The backward pass decodes W's codes again: no dequantized W is kept for it.

    Source: Frantar et al. 2024, MARLIN (arXiv 2408.11743); Wei et al. 2024, T-MAC (2407.00088); Liu et al.
    2024, COMET (2410.12168); Ma et al. 2024, bipolar integers (2409.17870).

    Example:
        >>> import frugax, jax
        >>> W, x = jax.random.normal(jax.random.key(0), (256, 64)), jax.numpy.ones((2, 256))
        >>> w = frugax.formats.quantize(W, "int4", group_size=128)
        >>> frugax.kernels.quantized_matmul(x, w).shape, w.nbytes / W.nbytes
        ((2, 64), 0.1328125)
    """
    call, spec = check(as_shaped(x), w, as_shaped(bias), activations, method)
    return OPERATION(call, backend, spec=spec).reshape(*x.shape[:-1], w.shape[1])
