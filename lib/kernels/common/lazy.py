"""Kernels that are traced only where a program is lowered for their platform.

`jax.lax.platform_dependent` traces each platform's branch at every call. Here the call is one primitive: its
results have the types of the portable branch, and its lowering rule for a platform traces that platform's.
"""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from . import compat

# The platform that each Pallas backend is compiled for, as JAX's lowering rules name it.
PLATFORM_OF = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}


@runtime_checkable
class Branch(Protocol):
    """A function for every platform, which knows its kernels too. Hashable: equal ones are traced once."""

    def __call__(self, *args: Any) -> Any:
        """The portable function."""

    def where_served(self, backend: str, *args: Any) -> Any:
        """The same by a Pallas backend where that can serve the arguments."""


def when_lowered(branch: Branch, *args: Any) -> Any:
    """`branch` of `args`, by the kernel of the platform that the program is lowered for, and traced then."""
    leaves, tree = jax.tree.flatten(args)
    call = _Call(branch, tree)
    traced = _jitted(call).trace(*leaves)  # once for a shape: cached
    results = _KERNEL.bind(*leaves, call=call, out=tuple(traced.jaxpr.out_avals))
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), results)


class _Call(NamedTuple):
    """The primitive's parameter: what is called, on arguments of which structure, mapped over which axes."""

    branch: Branch
    tree: Any
    mapped: tuple[tuple[int | None, ...], ...] = ()  # of each `vmap` around the call, the innermost first

    def run(self, platform: str | None, *leaves: Any) -> Any:
        """The results, by the platform's kernel if it serves these arguments."""
        backend = next((b for b, place in PLATFORM_OF.items() if place == platform), None)
        branch = self.branch if backend is None else functools.partial(self.branch.where_served, backend)

        def flat(*leaves: Any) -> Any:
            return branch(*self.tree.unflatten(leaves))

        for in_axes in self.mapped:
            flat = jax.vmap(flat, in_axes=in_axes)
        return flat(*leaves)


@functools.lru_cache(maxsize=4096)
def _jitted(call: _Call) -> Any:
    """The portable branch, under `jit` for its cache of traces."""
    return jax.jit(functools.partial(call.run, None))


@functools.lru_cache(maxsize=4096)
def _compiled(call: _Call, out: tuple[Any, ...]) -> Any:
    """The primitive by itself, for calls outside of any `jit`."""
    return jax.jit(lambda *leaves: _KERNEL.bind(*leaves, call=call, out=out))


def _run_alone(*leaves: Any, call: _Call, out: tuple[Any, ...]) -> Any:
    # Without jit `_compiled` would end here again: the portable branch, step by step.
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # defined as JAX is imported
        return jax.tree.leaves(call.run(None, *leaves))
    return _compiled(call, out)(*leaves)


_KERNEL = Primitive("frugax_kernel")
_KERNEL.multiple_results = True
_KERNEL.def_impl(_run_alone)
_KERNEL.def_abstract_eval(lambda *leaves, call, out: list(out))
compat.needs_devices_to_lower(_KERNEL)  # the partitioner's callbacks may be among what a kernel lowers to


def _lower(ctx, *leaves, call, out, platform=None):
    run = _jitted(call) if platform is None else functools.partial(call.run, platform)
    flat = lambda *xs: jax.tree.leaves(run(*xs))  # noqa: E731
    return mlir.lower_fun(flat, multiple_results=True)(ctx, *leaves)


mlir.register_lowering(_KERNEL, _lower)
for _platform in PLATFORM_OF.values():
    mlir.register_lowering(_KERNEL, functools.partial(_lower, platform=_platform), platform=_platform)


def _batch(leaves, dims, *, call, out):
    mapped = call._replace(mapped=(*call.mapped, tuple(dims)))
    out = tuple(_jitted(mapped).trace(*leaves).jaxpr.out_avals)
    return _KERNEL.bind(*leaves, call=mapped, out=out), [0] * len(out)


batching.primitive_batchers[_KERNEL] = _batch
