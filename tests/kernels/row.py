"""A row of the table of operations, and how its calls are run: see harness.py."""

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.seeds import generator

Case = dict[str, Any]
Arguments = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Row:
    """An operation: its public function, and what tests need to know of it.

    Attributes:
      function: the public function. All its float arguments have gradients.
      calls: the folder's calls.py. `draw` makes a case's arguments; CASES are those that each backend has to
        get right; WRONG changes the call GOOD into ones that can't be right. CHECKED are changes of GOOD that
        `checkify` reports, or not (None); REFUSED are calls that a kernel can't serve, and its reason.
      definition: the equation in float64 numpy, which also takes complex numbers.
      axes: the axes of each array argument; those of other ranks after a bar: "h | b t h".
      small: a case with all arguments, some documents, and few tokens.
      changed: what `small` has otherwise for a backend that can't serve it.
      defined: further cases in which the reference is held to `definition`.
      like: the argument that has the output's dtype.
      states: for each array of the state the argument that has its dtype, or None: float32, but float64 for
        float64 inputs.
      split: the axes that may lie on two axes of a mesh, or none.
      placed: a case that can be split so, 4 and 2 ways.
      meshes: the types that the mesh's axes may have.
      quick: the interpreted kernel is placed in the default tier too.
      exported: a case that the kernels of all platforms serve.
      on_tpu, on_gpu: cases to compile for TPUs and an H200 that are not here: by default the first two and
        the first.
      spilled: bytes that a kernel of the pass back may spill on the H200.
      kernels: how many kernels a program with gradients has, on TPU and on GPU.
      wgmma: kernels on GPU multiply matrices on tensor cores.
      narrow: as many roundings to the inputs' dtype follow one another.
      exact_state: states keep float32's precision beside narrower inputs.
      summed: arguments with gradients that kernels get as running sums: documents cancel but for rounding.
      twice: the backends that JAX differentiates, any number of times.
      choice, reference: the argument that names a backend, and the backend that is the definition.
      check: holds results to something else than the definition in float64; there are no gradients then.
    """

    function: Callable[..., Any]
    calls: ModuleType
    definition: Callable[..., Any] | None
    axes: dict[str, str]
    small: Case
    like: str
    changed: dict[str, Case] = field(default_factory=lambda: {"pallas_gpu": {"dtype": "bfloat16"}})
    defined: Sequence[Case] = ()
    states: tuple[str | None, ...] = (None,)
    split: tuple[str, ...] = ()
    placed: Case | None = None
    meshes: tuple[str, ...] = ("Auto", "Explicit")
    quick: bool = False
    exported: Case | None = None
    on_tpu: Sequence[Case] = ()
    on_gpu: Sequence[Case] = ()
    spilled: int = 0
    kernels: tuple[int, int] = (2, 2)
    wgmma: bool = False
    narrow: int = 1
    exact_state: bool = False
    summed: tuple[str, ...] = ()
    twice: tuple[str, ...] = ("xla", "reference")
    choice: str = "backend"
    reference: str = "reference"
    check: Callable[..., None] | None = None

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def composed(self) -> bool:
        """True if it is made of other operations, and has no backends of its own."""
        return "xla" not in self.cases

    @property
    def cases(self) -> dict[str | None, list[Case]]:
        return self.calls.CASES

    def arguments(self, case: Case) -> Arguments:
        """Return the keyword arguments of a case, the same at every call."""
        drawn = self.calls.draw(generator(zlib.crc32(repr(case).encode())), **case)
        return {n: np.asarray(x, np.int32) if isinstance(x, list) else x for n, x in drawn.items()}

    def small_on(self, backend: str | None) -> Case:
        """Return `small` in the dtypes and sizes that a backend serves."""
        return self.small | self.changed.get(backend, {})

    def axes_of(self, name: str, arguments: Arguments) -> str:
        """Return the axes of an array among the arguments: "b t h"."""
        rank = np.ndim(arguments[name])
        return next(axes.strip() for axes in self.axes[name].split("|") if len(axes.split()) == rank)

    def call(self, backend: str | None, **arguments: Any) -> Any:
        """Return the results as a tuple, the output first."""
        results = self.function(**arguments, **{self.choice: backend})
        return results if isinstance(results, tuple) else (results,)


def parts(arguments: Arguments) -> tuple[Arguments, Arguments, Arguments]:
    """Return the float arguments, the other arrays, and static values."""
    floats, arrays, static = {}, {}, {}
    for name, x in arguments.items():
        leaves = jax.tree.leaves(x)
        if not leaves or not all(hasattr(leaf, "dtype") for leaf in leaves):
            static[name] = x
        elif all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
            floats[name] = x
        else:
            arrays[name] = x
    return floats, arrays, static


def program(row: Row, backend: str | None, static: Arguments, differentiate: bool = True) -> Any:
    """Return the compiled function of (floats, arrays, keep) under `value_and_gradients` and `run`."""
    return _program(row, backend, tuple(static.items()), differentiate and row.check is None)


@functools.cache
def _program(row: Row, backend: str | None, static: tuple, differentiate: bool) -> Any:
    @jax.jit
    def run(floats, arrays, keep):
        def call(floats):
            return row.call(backend, **floats, **arrays, **dict(static))

        if not differentiate:
            return call(floats), {}
        results, pullback = jax.vjp(call, floats)
        rng = np.random.default_rng(7)
        leaves, tree = jax.tree.flatten(results)
        weights = [
            jnp.asarray(rng.standard_normal(x.shape).astype(jnp.bfloat16).astype(x.dtype)) for x in leaves
        ]
        if keep is not None:
            weights[0] *= keep.reshape(*keep.shape, *[1] * (weights[0].ndim - 2)).astype(weights[0].dtype)
        return results, pullback(tree.unflatten(weights))[0]

    return run


def value_and_gradients(
    row: Row, arguments: Arguments, backend: str | None, keep: Any = None
) -> tuple[tuple, Arguments]:
    """Return the results, and the gradient of each float argument for the same random cotangents.

    keep [B, T] multiplies the cotangent of the output, whose axes begin with batch and time.
    """
    floats, arrays, static = parts(arguments)
    return program(row, backend, static)(floats, arrays, keep)


def run(row: Row, arguments: Arguments, backend: str | None = None) -> tuple:
    """Return the results alone."""
    floats, arrays, static = parts(arguments)
    run = program(row, backend, static, differentiate=False)
    return run(floats, arrays, None)[0]


def both_passes(row: Row, case: Case) -> tuple[Callable[..., Any], tuple]:
    """Return a function of values and gradients that picks its backend, and the shapes that it takes."""
    floats, arrays, static = parts(row.arguments(case))
    function = program(row, None, static).__wrapped__
    return (lambda floats, arrays: function(floats, arrays, None)), structs((floats, arrays))


def structs(tree: Any) -> Any:
    """Return the shapes and dtypes of the arrays in a tree."""
    is_array = lambda x: hasattr(x, "dtype")  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x, tree)


def widened(arguments: Arguments) -> Arguments:
    """Return the same numbers with floats in float64."""
    floats, *_ = parts(arguments)
    return arguments | jax.tree.map(lambda x: np.asarray(x, np.float64), floats)


_EXPECTED: dict[tuple[str, str], Any] = {}


def expected(row: Row, case: Case) -> tuple[tuple, Arguments]:
    """Return what `value_and_gradients` should give for a case: the definition's, in float64."""
    key = row.name, repr(case)
    if key not in _EXPECTED:  # backends share cases
        with jax.enable_x64(True):
            found = value_and_gradients(row, widened(row.arguments(case)), row.reference)
        _EXPECTED[key] = jax.tree.map(np.asarray, found)
    return _EXPECTED[key]


def narrowest(arguments: Arguments) -> np.dtype:
    """Return the float arguments' dtype of least precision."""
    leaves = jax.tree.leaves(parts(arguments)[0])
    return max((np.dtype(x.dtype) for x in leaves), key=lambda dtype: float(jnp.finfo(dtype).eps))


def text(case: Case) -> str:
    """Return a case as a test's name shows it."""
    short = (
        name if x is True else f"no_{name}" if x is False else x if isinstance(x, str) else f"{name}{x}"
        for name, x in case.items()
    )
    return "-".join(short).replace(" ", "")
