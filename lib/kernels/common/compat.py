"""The one place that knows what differs between jax 0.10.2, 0.11.2 and 0.12."""

import inspect
from typing import Any

import jax


def gpu_interpret_params() -> Any:
    """The value of `plgpu.kernel(..., interpret=...)` that runs a Mosaic GPU kernel on CPU."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # private until jax exports it

    return InterpretGPUParams()


def gpu_params(**others: Any) -> Any:
    """`plgpu.CompilerParams` for kernels that say what each lane does, as jax 0.10 has it by default.

    By default 0.12 infers layouts instead, which for a kernel of many lines takes minutes, and selects by a
    scalar predicate only among scalars.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, **others)


def gpu_load(ref: Any, layout: Any) -> jax.Array:
    """Load all of `ref` in a layout of Mosaic GPU.

    jax 0.10 asks for an index, 0.11 deprecates it, 0.12 has none.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    idx = inspect.signature(plgpu.load).parameters.get("idx")
    index = [()] if idx is not None and idx.default is inspect.Parameter.empty else []
    return plgpu.load(ref, *index, layout=layout)


def local_gpu_lacks_mosaic() -> str | None:
    """The reason why this process' GPU can't run Mosaic GPU kernels; None if it can, or if there is none.

    A program lowered where no GPU is present (export, deviceless compilation) is taken to be for Hopper.
    """
    if jax.default_backend() != "gpu":
        return None
    capability = jax.devices()[0].compute_capability
    if float(capability) < 9.0:
        return f"Mosaic GPU needs Hopper (compute capability 9.0) or newer; this GPU has {capability}"
    return None


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes that `x` varies over inside a `shard_map`, as its type says; none elsewhere."""
    return jax.typeof(x).manual_axis_type.varying  # `vma` before jax 0.10, and no public name since


def vary(x: Any, axes: frozenset[str]) -> Any:
    """`x`, typed as varying over `axes` as well."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def untyped_manual_axes() -> Any:
    """A context in which operations inside a `shard_map` don't track the axes that values vary over."""
    from jax._src import config  # private: `shard_map(check_vma=False)` is the public way, for a whole body

    return config._check_vma(False)


def partition_spec(sharding: Any, mesh: Any) -> Any:
    """The PartitionSpec of the partitioner's `sharding` over `mesh`; an empty one where it has no name."""
    from jax._src import sharding_impls  # private: the public decoding raises on what a mesh can't name

    try:
        return sharding_impls.parse_flatten_op_sharding(sharding._hlo_sharding, mesh)[0]
    except Exception:
        return jax.sharding.PartitionSpec()


def needs_devices_to_lower(primitive: Any) -> None:
    """Tell JAX that lowering `primitive` may ask for the program's devices, as custom partitioning does."""
    from jax._src import dispatch  # private: the public primitives are all registered there already

    dispatch.prim_requires_devices_during_lowering.add(primitive)
