"""How every operation picks its backend: by the platform a program is lowered for, or by name."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import jax

from .sharding import Axes, per_shard

Backend = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# The platform (as `jax.lax.platform_dependent` calls it) that each Pallas backend is compiled for.
PLATFORM_OF = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}

Out = TypeVar("Out")
_log = logging.getLogger("frugax")


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless `backend` is None or one of BACKENDS."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; one of {', '.join(map(repr, BACKENDS))} or None fits")


@functools.cache
def _say_once(op: str, backend: str, reason: str) -> None:
    _log.info("%s: %s can't serve this call (%s); xla does", op, backend, reason)


def plan(op: str, backend: str | None, reasons: Mapping[str, str | None]) -> dict[str, str]:
    """Which backend serves the call on each platform: {"cpu": ..., "tpu": ..., "cuda": ...}.

    Args:
      op: the operation's name, for messages.
      backend: the caller's choice; None picks per platform.
      reasons: for each Pallas backend, why it can't serve this call (None: it can).

    Raises:
      ValueError: a named Pallas backend can't serve the call.
    """
    check_backend(backend)
    if backend in ("reference", "xla"):
        return dict.fromkeys(("cpu", "tpu", "cuda"), backend)
    if backend is not None:
        if reasons[backend] is not None:
            raise ValueError(f"{op}: backend={backend!r} can't serve this call: {reasons[backend]}")
        named = {PLATFORM_OF[backend]: backend}
        # Mosaic GPU's interpreter has effects, which a program for a GPU can't hold, not even in a CPU branch.
        if backend != "pallas_gpu" or jax.default_backend() == "cpu":
            named["cpu"] = f"{backend} (interpreted)"
        return named
    chosen = {"cpu": "xla", "tpu": "xla", "cuda": "xla"}
    for name, reason in reasons.items():
        if reason is None:
            chosen[PLATFORM_OF[name]] = name
        else:
            _say_once(op, name, reason)
    return chosen


def run(
    chosen: Mapping[str, str],
    implementation: Callable[[str, bool], Callable[..., Out]],
    *args: Any,
    axes: Axes | None = None,
    independent: Sequence[str] = ("b", "h"),
) -> Out:
    """Call the implementation that `chosen` (from `plan`) names for the platform being lowered for.

    Args:
      chosen: platform -> backend.
      implementation: (backend, interpret) -> a function of `args`.
      axes: names of the axes of `args` and of the result, for kernels to run per shard (`per_shard`).
      independent: which of those axes may be split over a mesh.
    """

    def placed(backend: str, interpret: bool) -> Callable[..., Out]:
        f = implementation(backend, interpret)
        if axes is None:
            return f
        opaque = backend in PLATFORM_OF
        partitioner = backend == "pallas_gpu" and not interpret  # what interprets it on CPU has effects
        return per_shard(f, axes, independent, opaque=opaque, partitioner=partitioner)

    branches = {}
    for platform, name in chosen.items():
        backend, _, interpreted = name.partition(" ")
        branches[platform] = placed(backend, bool(interpreted))
    if set(chosen.values()) <= {"reference", "xla"}:
        return branches["cpu"](*args)
    if "xla" in chosen.values():  # platforms that plan() does not name, such as rocm, get xla too
        branches = {p: f for p, f in branches.items() if chosen[p] != "xla"}
        return jax.lax.platform_dependent(*args, default=placed("xla", False), **branches)
    return jax.lax.platform_dependent(*args, **branches)
