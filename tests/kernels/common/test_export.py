"""One jitted function exports to CPU, TPU and GPU, each with the kernel of its platform."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

import frugax

# The kernels' custom calls, which `jax.export` can't promise to keep stable.
KERNEL_CALLS = [
    export.DisabledSafetyCheck.custom_call(name)
    for name in ("tpu_custom_call", "mosaic_gpu_v2", "mosaic_gpu")
]
X = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
X_BTD = jax.ShapeDtypeStruct((1, 128, 128), jnp.float32)
X_BTHGD = jax.ShapeDtypeStruct((1, 128, 2, 4, 64), jnp.bfloat16)
R_HGDD = jax.ShapeDtypeStruct((2, 4, 64, 64), jnp.bfloat16)
CALLS = {
    "linear_attention": (frugax.kernels.linear_attention, (X, X, X, X)),
    "linear_recurrence": (frugax.kernels.linear_recurrence, (X_BTD, X_BTD)),
    "causal_conv1d": (frugax.kernels.causal_conv1d, (X_BTD, jax.ShapeDtypeStruct((4, 128), jnp.float32))),
    "rnn": (frugax.kernels.rnn, (X_BTHGD, R_HGDD)),
}


@pytest.mark.parametrize(
    ("platform", "mark"), [("cpu", None), ("tpu", "tpu_custom_call"), ("cuda", "mosaic_gpu")]
)
@pytest.mark.parametrize("op", CALLS)
def test_export(op, platform, mark):
    f, structs = CALLS[op]

    @jax.jit
    def gradient(*args):
        return jax.grad(lambda *a: jnp.sum(f(*a)[0].astype(jnp.float32)), argnums=(0, 1))(*args)

    module = export.export(gradient, platforms=[platform], disabled_checks=KERNEL_CALLS)(
        *structs
    ).mlir_module()
    for name in ("tpu_custom_call", "mosaic_gpu"):
        assert (name in module) == (name == mark)
