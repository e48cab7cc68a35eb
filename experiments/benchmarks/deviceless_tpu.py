"""Compile for a TPU that is not here: libtpu's own compiler, on any machine."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from frugax.planner import topology

# The smallest topology of each chip that libtpu knows.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
CHIPS = tuple(TOPOLOGIES)


def has_libtpu() -> bool:
    """Say if the TPU compiler is installed (the `deviceless` extra)."""
    return importlib.util.find_spec("libtpu") is not None


@functools.cache
def devices(chip: str) -> tuple[Any, ...]:
    """The abstract devices of `chip`'s smallest topology."""
    if chip not in TOPOLOGIES:
        raise ValueError(f"chip: got {chip!r}; one of {', '.join(map(repr, CHIPS))} fits")
    return topology(TOPOLOGIES[chip]).devices


def compile_for(chip: str, f: Callable[..., Any], *structs: Any, donate_argnums: tuple[int, ...] = ()) -> Any:
    """Compile `f` for one core of a TPU chip.

    Args:
      chip: "v5e", "v5p", "v6e" or "tpu7x".
      f: a function of arrays (or trees of them).
      *structs: trees of `jax.ShapeDtypeStruct` (or None), the arguments' shapes.
      donate_argnums: arguments whose memory the results may take.

    Returns:
      The `jax.stages.Compiled`: `as_text()`, `memory_analysis()`, `cost_analysis()`; it can't run.

    Raises:
      ValueError: an unknown chip. What the compiler refuses raises its own error.
    """
    here = NamedSharding(Mesh(np.array(devices(chip)[:1]), ("device",)), PartitionSpec())
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), structs)
    return jax.jit(f, donate_argnums=donate_argnums).lower(*placed).compile()
