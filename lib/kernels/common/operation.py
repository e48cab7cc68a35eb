"""An operation: it picks a backend by the platform lowered for or by name, runs it, and differentiates."""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from .arguments import known
from .isolation import isolated
from .lazy import PLATFORM_OF, when_lowered
from .sharding import AxisNames, align, per_shard

Backend = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_log = logging.getLogger("frugax")


class Choice(NamedTuple):
    """The backend that would serve a call on each platform, and why a kernel would not."""

    operation: str
    backends: dict[str, str]  # "cpu", "tpu", "cuda" -> the backend's name
    reasons: dict[str, str]  # a kernel's name -> why it can't serve the call


_choices: ContextVar[list[Choice] | None] = ContextVar("frugax_choices", default=None)


@contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """Collect the choice of every operation called inside; their calls then run "xla", whatever they name."""
    choices: list[Choice] = []
    token = _choices.set(choices)
    try:
        yield choices
    finally:
        _choices.reset(token)


def record_choice(choose: Callable[[], Choice]) -> bool:
    """Record a choice, which `choose` makes, if anyone collects them; say whether someone does."""
    choices = _choices.get()
    if choices is None:
        return False
    choices.append(choose())
    return True


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless `backend` is None or one of BACKENDS."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; expected {', '.join(map(repr, BACKENDS))} or None")


@dataclass(frozen=True)
class Operation:
    """One operation's backends, and what they need to know of its arrays.

    A backend is a module of the operation's folder. Each has `forward(call, **options)`. A Pallas backend has
    `unsupported_reason(call)` and `backward(call, *kept, cotangents, **options) -> the gradient of call`,
    both functions with `interpret=`; "xla" may have `backward` too, else JAX differentiates its `forward`.

    Attributes:
      name: the folder in `frugax.kernels`.
      arguments: the axes of each array of the call, a NamedTuple like it: "b t h k". Alternatives of other
        lengths stand between bars: "h | b t h". Or a function of the call and the options that gives them.
      results: the axes of each result; a tree of strings, or a function likewise.
      independent: the axes that may be split over a mesh.
      sequence: the call's array [batch, time, ...] whose kernel on GPU pads time to a chunk: a single token
        goes to xla, unless a backend is named. None: there is no such kernel.
      keeps: positions of the results that `backward` is given, after the call.
      extra: the axes of one result more, for `backward` alone, that `forward(..., keep=True)` gives.
      static: the options that `unsupported_reason` takes besides the call.
      documents: the call's array [B, T] with the number of each token's document, or None: there NaN is kept
        from other documents (isolation.py). For operations whose products mix tokens.
      gates: the call's arrays in which minus infinity is a value like others.
    """

    name: str
    arguments: Any
    results: Any
    independent: tuple[str, ...]
    sequence: str | None = None
    keeps: tuple[int, ...] = ()
    extra: str | None = None
    static: tuple[str, ...] = ()
    documents: str | None = None
    gates: tuple[str, ...] = ()

    def __call__(self, call: Any, backend: str | None, **options: Any) -> Any:
        """The results for a checked call, differentiable in its floating arrays.

        Args:
          call: a NamedTuple of arrays, None where the caller gave none.
          backend: the caller's choice; None picks by the platform that the program is lowered for.
          options: what the backends take besides arrays, hashable.

        Raises:
          ValueError: a named backend does not exist, or can't serve the call.
        """
        check_backend(backend)
        if record_choice(lambda: self._choice(call, backend, options)):
            backend = "xla"
        call = align(call, self._names(call, options), self.independent)
        if backend == "reference":  # the definition, token by token, mixes none
            return self._run("forward", backend, options, (call,))
        if backend not in ("xla", None):
            self._check_serves(backend, self.unsupported_reason(backend, call, options))
        index = None if self.documents is None else getattr(call, self.documents)
        run = partial(self._differentiable, backend, options)
        if index is None:
            return run(call)
        (names,), results = self._axes("forward", options, (call,))
        return isolated(run, call, names, results, index=index, gates=self.gates)

    def _differentiable(self, backend: str | None, options: dict[str, Any], call: Any) -> Any:
        if backend == "xla":  # JAX differentiates it by itself
            return self._run("forward", backend, options, (call,))
        return _with_gradient(self, backend, tuple(options.items()), call)

    def unsupported_reason(self, backend: str, call: Any, options: dict[str, Any]) -> str | None:
        """Why a Pallas backend can't serve the call; None if it can."""
        if not all(known(size) for x in jax.tree.leaves(call) for size in x.shape):
            return "a size is a symbol, where a kernel's are numbers"
        static = {name: options[name] for name in self.static}
        reason = self._module(backend).unsupported_reason(call, **static)
        if reason is not None:
            return reason
        wide = (n for n, x in call._asdict().items() for a in jax.tree.leaves(x) if a.dtype == jnp.float64)
        return next((f"{name} is float64, where a kernel's arrays have 32 bits" for name in wide), None)

    def _check_serves(self, backend: str, reason: str | None) -> None:
        if reason is not None:
            raise ValueError(f"{self.name}: backend={backend!r} can't serve this call: {reason}")

    def _choice(self, call: Any, backend: str | None, options: dict[str, Any]) -> Choice:
        """The choice that `explain` prints."""
        reasons = {b: self.unsupported_reason(b, call, options) for b in PLATFORM_OF}
        if backend is None:
            reasons = {b: reason or self._passes_by(b, call) for b, reason in reasons.items()}
        missing = {b: reason for b, reason in reasons.items() if reason is not None}
        if backend in ("reference", "xla"):
            return Choice(self.name, dict.fromkeys(("cpu", "tpu", "cuda"), backend), missing)
        if backend is not None:
            self._check_serves(backend, missing.get(backend))
            marks = {place: " (interpreted)" * interpret for place, interpret in _places(backend).items()}
            return Choice(self.name, {place: backend + mark for place, mark in marks.items()}, missing)
        served = {PLATFORM_OF[b]: b for b in PLATFORM_OF if b not in missing}
        return Choice(self.name, {"cpu": "xla", "tpu": "xla", "cuda": "xla"} | served, missing)

    def _passes_by(self, backend: str, call: Any) -> str | None:
        """Why a kernel that could serve the call is left out all the same."""
        if backend == "pallas_gpu" and self.sequence and getattr(call, self.sequence).shape[1] == 1:
            return "one token, which it would pad to a chunk"
        return None

    def _module(self, backend: str) -> Any:
        """The backend's module, imported when asked for: who meets no kernel never imports Pallas."""
        return importlib.import_module(f"..{self.name}.{backend}", __package__)

    def _names(self, call: Any, options: dict[str, Any]) -> Any:
        if callable(self.arguments):
            return self.arguments(call, **options)
        return type(call)(*(_alternative(n, x) for n, x in zip(self.arguments, call, strict=True)))

    def _axes(self, phase: str, options: dict[str, Any], args: tuple[Any, ...]) -> AxisNames:
        """The axes of what a phase takes and returns."""
        call = args[0]
        names = self._names(call, options)
        results = self.results(call, **options) if callable(self.results) else self.results
        extra = () if self.extra is None else (self.extra,)
        if phase == "forward":
            return AxisNames((names,), results)
        if phase == "forward_keeping":
            return AxisNames((names,), (*results, *extra) if extra else results)
        kept = tuple(results[i] for i in self.keeps)
        gradients = jax.tree.map(lambda x, name: name if _is_float(x) else None, call, names)
        return AxisNames((names, *kept, *extra, results), gradients)

    def _run(self, phase: str, backend: str | None, options: dict[str, Any], args: tuple[Any, ...]) -> Any:
        """Call the phase on the backend named; with None, on each platform's own when lowered for it."""
        branch = partial(_Branch, self, phase, tuple(options.items()), self._axes(phase, options, args))
        if backend is None:
            return when_lowered(branch("xla"), *args)
        if backend in ("reference", "xla"):
            return branch(backend)(*args)
        places = {place: branch(backend, interpret=how) for place, how in _places(backend).items()}
        return jax.lax.platform_dependent(*args, **places)


def _places(backend: str) -> dict[str, bool]:
    """The platforms that a named Pallas backend serves, and whether it is interpreted there."""
    # Mosaic GPU's interpreter has effects, which a program for a GPU can't hold, in no branch.
    on_cpu = backend != "pallas_gpu" or jax.default_backend() == "cpu"
    return {PLATFORM_OF[backend]: False} | ({"cpu": True} if on_cpu else {})


@dataclass(frozen=True)
class _Branch:
    """One phase of an operation on one backend: a hashable function of the phase's arguments."""

    operation: Operation
    phase: str
    options: tuple[tuple[str, Any], ...]
    axes: AxisNames
    backend: str
    interpret: bool = False

    def __call__(self, *args: Any) -> Any:
        op, kernel = self.operation, self.backend in PLATFORM_OF
        module, options = op._module(self.backend), dict(self.options)
        if self.phase == "backward":
            run = getattr(module, "backward", None) or partial(_transpose, module.forward)
        else:
            run = module.forward
            options |= {"keep": True} if self.phase == "forward_keeping" and op.extra is not None else {}
        options |= {"interpret": self.interpret} if kernel else {}
        # What interprets a GPU's kernel on CPU has effects, which custom partitioning can't hold.
        partitioner = self.backend == "pallas_gpu" and not self.interpret
        run = partial(run, **options)
        run = per_shard(run, self.axes, op.independent, opaque=kernel, partitioner=partitioner)
        if not kernel:
            return run(*args)
        with jax.enable_x64(False):  # a kernel takes no 64 bits, and Pallas' own indices have 32
            return run(*args)

    def where_served(self, backend: str, *args: Any) -> Any:
        """The phase on a Pallas backend; on this one, which the log says once, where that can't serve it."""
        op, call = self.operation, args[0]
        reason = op.unsupported_reason(backend, call, dict(self.options)) or op._passes_by(backend, call)
        if reason is None:
            return replace(self, backend=backend)(*args)
        _say_once(op.name, backend, reason)
        return self(*args)


@functools.cache
def _say_once(operation: str, backend: str, reason: str) -> None:
    _log.info("%s: %s can't serve this call (%s); xla does", operation, backend, reason)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _with_gradient(operation: Operation, backend: str | None, options: tuple, call: Any) -> Any:
    return operation._run("forward", backend, dict(options), (call,))


def _forward(operation: Operation, backend: str | None, options: tuple, call: Any) -> Any:
    results = operation._run("forward_keeping", backend, dict(options), (call,))
    if operation.extra is None:
        return results, (call, *(results[i] for i in operation.keeps))
    *results, extra = results
    return tuple(results), (call, *(results[i] for i in operation.keeps), extra)


def _backward(
    operation: Operation, backend: str | None, options: tuple, saved: tuple, cotangents: Any
) -> Any:
    return (operation._run("backward", backend, dict(options), (*saved, cotangents)),)


_with_gradient.defvjp(_forward, _backward)


def _alternative(names: str, x: Any) -> str | None:
    """The axes of `x` among alternatives such as "h | b t h"; None where there is no array."""
    if x is None:
        return None
    return next(axes.strip() for axes in names.split("|") if len(axes.split()) == x.ndim)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _transpose(forward: Callable[..., Any], call: Any, *kept_and_cotangents: Any, **options: Any) -> Any:
    """The gradient of `call` by JAX's own differentiation, None for its integer arrays."""
    leaves, tree = jax.tree.flatten(call)
    floats = [x if _is_float(x) else None for x in leaves]

    def of_floats(floats: list[Any]) -> Any:
        merged = (x if f is None else f for x, f in zip(leaves, floats, strict=True))
        return forward(jax.tree.unflatten(tree, merged), **options)

    _, pullback = jax.vjp(of_floats, floats)
    return jax.tree.unflatten(tree, pullback(kept_and_cotangents[-1])[0])
