"""One jitted function is lowered for CPU, TPU and GPU, each with its platform's kernel, as `explain` says."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

import frugax

from .harness import OPERATIONS, over, parts, structs

# The kernels' custom calls, which `jax.export` can't promise to keep stable.
KERNEL_CALLS = [
    export.DisabledSafetyCheck.custom_call(name)
    for name in ("tpu_custom_call", "mosaic_gpu_v2", "mosaic_gpu")
]
MARKS = {"cpu": None, "tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}
KERNELS = {"cpu": "xla", "tpu": "pallas_tpu", "cuda": "pallas_gpu"}


def exported() -> list:
    """Return the operations; those composed of others, whose kernels are theirs, for the full tier."""
    return [
        pytest.param(row.name, marks=pytest.mark.full if row.composed else [])
        for row in OPERATIONS.values()
        if row.exported
    ]


@pytest.mark.parametrize("operation", exported())
def test_each_platform_has_its_kernel(operation):
    row = OPERATIONS[operation]
    arguments = row.arguments(row.exported)
    floats, arrays, static = parts(arguments)

    @jax.jit
    def gradient(floats, arrays):
        def total(floats):
            return sum(
                jnp.sum(x.astype(jnp.float32)) for x in row.call(None, **floats, **arrays, **static)[:1]
            )

        return total(floats) if row.check else jax.grad(total)(floats)

    for platform, mark in MARKS.items():
        exported = export.export(gradient, platforms=[platform], disabled_checks=KERNEL_CALLS)
        module = exported(*structs((floats, arrays))).mlir_module()
        for name in filter(None, MARKS.values()):
            assert (name in module) == (name == mark), platform


@pytest.mark.parametrize("operation", over(lambda row: row.exported))
def test_explain_names_each_platforms_kernel(operation):
    row = OPERATIONS[operation]
    said = frugax.kernels.explain(row.name, **structs(row.arguments(row.exported)))
    for platform, backend in KERNELS.items():
        assert f"{platform}: {backend}" in said
