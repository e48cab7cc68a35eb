"""Dense layers with kernels that may be packed, and the projections of our layers."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import default_kernel_init
from flax.typing import Initializer
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from ...formats import Format, QuantizedTensor, format_named, quantize
from ...kernels import MixedActivations, quantized_matmul
from ...kernels.common.operation import Backend
from ...parallel.activations import automatic_axes
from ...parallel.overlap import ring_products
from .bit_linear import BitLinear
from .inputs import beside
from .packed import matrix_param


class Dense(nn.Module):
    """x W + b over the last axis, as `flax.linen.Dense`; W may be packed, and b and W in any dtype.

    With a `QuantizedTensor` for a kernel it runs `frugax.kernels.quantized_matmul`. All layers here are made
    of it: `frugax.quant.quantize_params` packs a trained tree, and the same module runs it.

    Attributes:
      features, use_bias, dtype, param_dtype, kernel_init, bias_init: as in `flax.linen.Dense`.
      backend: handed to `frugax.kernels` where W is packed; None picks by platform.
      dot_general_cls: a module that multiplies x and W, as `frugax.quant.training.LowBitDotGeneral` does.
      parts: columns of each of several matrices that lie side by side in W: the result is a list of their
        products. Where the mesh splits the columns ("tensor"), each device takes its share of each matrix.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> layer, x = frugax.layers.Dense(64), jnp.ones((2, 128))
        >>> params = layer.init(jax.random.key(0), x)["params"]
        >>> packed = params | {"kernel": frugax.formats.quantize(params["kernel"], "int8")}
        >>> y, near = (layer.apply({"params": p}, x) for p in (params, packed))
        >>> bool(jnp.allclose(y, near, atol=0.1))
        True
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    backend: Backend | None = None
    dot_general_cls: Any = None
    parts: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x: Array) -> Any:
        shape = (x.shape[-1], self.features)
        kernel = matrix_param(self, "kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype) if self.use_bias else None
        if isinstance(kernel, QuantizedTensor):
            x, bias = promote_dtype(x, bias, dtype=self.dtype)
            y = quantized_matmul(x, kernel, bias=bias, backend=self.backend)
            return y if self.parts is None else split_columns(y, self.parts)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        shares = automatic_axes().get("tensor", 1)
        if shares > 1 and self.dot_general_cls is None:
            matrices = [kernel] if self.parts is None else split_columns(kernel, self.parts)
            ys = ring_products(x, matrices, "/".join((*self.path, "kernel")))
            if ys is None and self.parts is not None:
                ys = _products(x, matrices, shares)
            if ys is not None:
                biases = [] if bias is None else split_columns(bias, [w.shape[1] for w in matrices])
                ys = [y + beside(b, y) for y, b in zip(ys, biases, strict=True)] if biases else ys
                return ys[0] if self.parts is None else ys
        if self.dot_general_cls is None:
            y = jnp.dot(x, kernel)
        else:
            y = self.dot_general_cls()(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        y = y if bias is None else y + beside(bias, y)
        return y if self.parts is None else split_columns(y, self.parts)


def split_columns(x: Array, sizes: Sequence[int]) -> list[Array]:
    """Cut the last axis into parts of these sizes."""
    return jnp.split(x, list(itertools.accumulate(sizes))[:-1], axis=-1)


def _products(x: Array, matrices: Sequence[Array], shares: int) -> list[Array]:
    """x times each matrix, in one product of which each device along "tensor" has its share of every matrix.

    Split as they lie, side by side, all of a matrix's columns would be on a few of the devices: the products
    would have to travel. The matrices travel here, which are smaller than the products of many tokens. Those
    that don't divide into shares are whole on each device.
    """
    split = [i for i, w in enumerate(matrices) if w.shape[1] % shares == 0]
    whole = [i for i, w in enumerate(matrices) if w.shape[1] % shares]
    products: dict[int, Array] = {}
    if split:
        free = PartitionSpec.UNCONSTRAINED
        cut = [matrices[i].reshape(-1, shares, matrices[i].shape[1] // shares) for i in split]
        cut = [jax.lax.with_sharding_constraint(w, PartitionSpec(free, "tensor", None)) for w in cut]
        y = jnp.einsum("...d,dsn->...sn", x, jnp.concatenate(cut, axis=2))
        ys = split_columns(y, [w.shape[2] for w in cut])
        products |= {i: y.reshape(*x.shape[:-1], -1) for i, y in zip(split, ys, strict=True)}
    if whole:
        y = jnp.dot(x, jnp.concatenate([matrices[i] for i in whole], axis=1))
        products |= dict(zip(whole, split_columns(y, [matrices[i].shape[1] for i in whole]), strict=True))
    return [products[i] for i in range(len(matrices))]


class QuantizedDense(nn.Module):
    """x W + b over the last axis with W in few bits: takes the place of `flax.linen.Dense`.

    W is born packed, from `kernel_init` rounded to the format, and stays as it is: it has no gradient.

    Attributes:
      features: columns of W.
      format: of W, or its name.
      group_size: rows of W that share a scale; None: the format's.
      activations: a format that each token is stored in first, as in `frugax.kernels.quantized_matmul`.
      use_bias, dtype, param_dtype, kernel_init, bias_init: as in `flax.linen.Dense`; the last four but
        `dtype` are of the bias and of W before it is rounded.
      backend: handed to `frugax.kernels`; None picks by platform.

    Raises:
      ValueError: the kernel is in another format.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> layer = frugax.layers.QuantizedDense(64, "int4", group_size=32)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 128)))
        >>> y.shape, variables["params"]["kernel"].nbytes
        ((2, 64), 5120)
    """

    features: int
    format: Format | str = "int4"
    group_size: int | None = None
    activations: Format | str | MixedActivations | None = None
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    backend: Backend | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)

        def packed(key, shape, dtype):
            w = self.kernel_init(key, shape, dtype)
            return quantize(w, self.format, axis=0, group_size=self.group_size)

        if self.has_variable("params", "kernel"):
            given, wanted = nn.meta.unbox(self.get_variable("params", "kernel")), format_named(self.format)
            if getattr(given, "format", None) != wanted:
                got = given.format.name if isinstance(given, QuantizedTensor) else given.dtype
                raise ValueError(f"kernel: got {got}; expected {wanted.name}")
        kernel = matrix_param(self, "kernel", packed, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype) if self.use_bias else None
        x, bias = promote_dtype(x, bias, dtype=self.dtype)
        return quantized_matmul(x, kernel, bias=bias, activations=self.activations, backend=self.backend)


def projection(
    features: int, *, scale: float = 1.0, ternary: bool = False, use_bias: bool = False, **attributes: Any
) -> Dense | BitLinear:
    """Make a layer's matrix: a `BitLinear` if `ternary`, else a `Dense`, by default without a bias.

    Its initial gain is `scale`, unless the attributes have a `kernel_init`.
    """
    init = nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
    kind = BitLinear if ternary else Dense
    return kind(features, use_bias=use_bias, **{"kernel_init": init} | attributes)


def projections(
    sizes: Sequence[int], *, ternary: bool = False, **attributes: Any
) -> Callable[[Array], list[Array]]:
    """Make one matrix that holds several side by side, and return the function that applies them.

    One larger product takes less time than several. Params are those of `projection` with all columns.
    """
    sizes = tuple(sizes)
    if ternary:
        layer: Callable[..., Any] = projection(sum(sizes), ternary=True, **attributes)
        return lambda x: split_columns(layer(x), sizes)
    return projection(sum(sizes), parts=sizes, **attributes)  # type: ignore[return-value]
