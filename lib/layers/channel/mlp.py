"""Channel mixers: what a block does to each token by itself."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ...kernels.common.operation import Backend
from ...parallel.activations import place_activations
from ..modules.dense import projection, projections
from ..modules.inputs import check_input

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}
ACTIVATIONS["relu2"] = lambda x: jnp.square(jax.nn.relu(x))


def activation_fn(name: str | None):
    """The activation called `name` (None: the identity), or ValueError naming those there are."""
    if name is None:
        return lambda x: x
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation: got {name!r}; expected one of {', '.join(map(repr, ACTIVATIONS))} or None"
        )
    return ACTIVATIONS[name]


class GLU(nn.Module):
    """Gated linear unit, W_out (activation(W_gate x) * W_in x): SwiGLU, or SGLU without an activation.

    Attributes:
      expand: hidden width over the input's; the hidden width is rounded up to a multiple of 8.
      activation: "silu" (SwiGLU), "gelu" (GEGLU), "relu", "relu2", "sigmoid", or None (SGLU).
      dtype, param_dtype, backend, out_scale, ternary: as in `Mixer`.

    Source: Shazeer 2020 (arXiv 2002.05202); SGLU from TransNormerLLM (2307.14995).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> y, params = frugax.layers.GLU().init_with_output(jax.random.key(0), jnp.ones((2, 5, 16)))
        >>> y.shape
        (2, 5, 16)
    """

    expand: int | float = 8 / 3
    activation: str | None = "silu"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    out_scale: float = 1.0
    ternary: bool = False
    backend: Backend | None = None

    pointwise: ClassVar[bool] = True  # each token by itself

    @nn.compact
    def __call__(self, x: Array) -> Array:
        act, dense, hidden = _prepare(self, x)
        # One matrix for gate and value: one larger matmul instead of two.
        gate, value = projections((hidden, hidden), name="gate_in", **dense.keywords)(x)
        inner = place_activations(act(gate) * value, inner=True)
        return dense(x.shape[-1], scale=self.out_scale, name="out")(inner)


class MLP(nn.Module):
    """Two matrices and an activation, W_out activation(W_in x).

    Attributes: those of `GLU`; the default, squared relu, is Primer's.

    Source: Primer, So et al. 2021 (arXiv 2109.08668).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> y, params = frugax.layers.MLP(expand=2).init_with_output(jax.random.key(0), jnp.ones((2, 5, 16)))
        >>> y.shape
        (2, 5, 16)
    """

    expand: int | float = 4.0
    activation: str | None = "relu2"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    out_scale: float = 1.0
    ternary: bool = False
    backend: Backend | None = None

    pointwise: ClassVar[bool] = True  # each token by itself

    @nn.compact
    def __call__(self, x: Array) -> Array:
        act, dense, hidden = _prepare(self, x)
        inner = place_activations(act(dense(hidden, name="in")(x)), inner=True)
        return dense(x.shape[-1], scale=self.out_scale, name="out")(inner)


def _prepare(module: GLU | MLP, x: Array):
    check_input(x, None)
    if module.expand <= 0:
        raise ValueError(f"expand: got {module.expand}; expected a number above 0")
    hidden = -8 * (-round(module.expand * x.shape[-1]) // 8)
    dense = functools.partial(
        projection,
        ternary=module.ternary,
        dtype=module.dtype or x.dtype,
        param_dtype=module.param_dtype,
        backend=module.backend,
    )
    return activation_fn(module.activation), dense, hidden
