"""How every operation picks its backend, by the platform lowered for or by name, and calls it."""

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from .sharding import Axes, per_shard

Backend = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# The platform (as `jax.lax.platform_dependent` calls it) that each Pallas backend is compiled for.
PLATFORM_OF = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}

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
        # Mosaic GPU's interpreter has effects, which a program for a GPU can't hold, in no branch.
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


@dataclasses.dataclass(frozen=True)
class Operation:
    """The rooms of one operation, and how to call whichever serves.

    Every room has `forward(call, ...)`; a Pallas room also `unsupported_reason(call)` and
    `backward(call, ..., cotangents, ...) -> the gradient of call`, both with `interpret=`.

    Attributes:
      name: the folder in `frugax.kernels`.
      independent: the axes of its arrays that may be split over a mesh.
      sequence: the call's array [batch, time, ...] whose kernel on GPU pads time to a chunk: a single token
        goes to xla, unless a backend is named. None: there is no such kernel.
    """

    name: str
    independent: tuple[str, ...]
    sequence: str | None = None

    def plan(self, call: Any, backend: str | None) -> tuple[dict[str, str], dict[str, str | None]]:
        """(platform -> backend, Pallas backend -> why it can't serve or None). Raises as `plan` does."""
        reasons = {name: self._room(name).unsupported_reason(call) for name in PLATFORM_OF}
        if backend is None and self.sequence and getattr(call, self.sequence).shape[1] == 1:
            reasons["pallas_gpu"] = reasons["pallas_gpu"] or "one token, which it would pad to a chunk"
        return plan(self.name, backend, reasons), reasons

    def forward(self, chosen: Mapping[str, str], axes: Axes, call: Any, **options: Any) -> Any:
        """The result, from the backend that `chosen` names for the platform being lowered for.

        Args:
          axes: names of the axes of `call` and of the result, for kernels to run per shard (`per_shard`).
          options: what the rooms take besides arrays, such as `scale`.
        """
        return self._run(chosen, axes, lambda room: room.forward, (call,), options)

    def backward(self, chosen: Mapping[str, str], axes: Axes, *args: Any, **options: Any) -> Any:
        """The gradient of the call; `args`: the call, what `backward` wants saved, the cotangents."""

        def of(room):
            return getattr(room, "backward", None) or partial(_transpose, room.forward)

        return self._run(chosen, axes, of, args, options)

    def _room(self, backend: str):  # imported when asked for, so that `import frugax` does not import Pallas
        return importlib.import_module(f"..{self.name}.{backend}", __package__)

    def _run(self, chosen, axes: Axes, of: Callable[[Any], Callable[..., Any]], args, options) -> Any:
        def placed(name: str) -> Callable[..., Any]:
            backend, _, interpreted = name.partition(" ")
            f = partial(of(self._room(backend)), **options)
            kernel = backend in PLATFORM_OF
            if kernel:
                f = partial(f, interpret=bool(interpreted))
            partitioner = backend == "pallas_gpu" and not interpreted  # what interprets it on CPU has effects
            return per_shard(f, axes, self.independent, opaque=kernel, partitioner=partitioner)

        names = set(chosen.values())
        if len(names) == 1 and not names & set(PLATFORM_OF):  # "xla" or "reference", everywhere
            return placed(names.pop())(*args)
        branches = {platform: placed(name) for platform, name in chosen.items() if name != "xla"}
        if "xla" in names:  # platforms that plan() does not name, such as rocm, get xla too
            return jax.lax.platform_dependent(*args, default=placed("xla"), **branches)
        return jax.lax.platform_dependent(*args, **branches)


def only_xla(chosen: Mapping[str, str]) -> bool:
    """Whether JAX differentiates the call by itself: no Pallas kernel is in it."""
    return set(chosen.values()) <= {"reference", "xla"}


def names_of(call: Any, names: Any) -> Any:
    """`names`, a NamedTuple of axes like `call`, with None where the call has no array."""
    return type(call)(*(name if x is not None else None for name, x in zip(names, call, strict=True)))


def _transpose(forward: Callable[..., Any], call: Any, *saved_and_cotangents: Any, **options: Any) -> Any:
    """The gradient of a NamedTuple `call` by JAX's own differentiation, None for its integer arrays."""
    fields = call._asdict().items()
    integers = {n: x for n, x in fields if x is not None and not jnp.issubdtype(x.dtype, jnp.floating)}
    floats = call._replace(**dict.fromkeys(integers))
    _, pullback = jax.vjp(lambda x: forward(x._replace(**integers), **options), floats)
    return pullback(saved_and_cotangents[-1])[0]
