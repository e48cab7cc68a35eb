"""Compile for a TPU that is not here: libtpu's own compiler, on any machine."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# libtpu must neither look for chips nor for other processes that hold them. Read when it is first loaded.
for _name, _value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}.items():
    os.environ.setdefault(_name, _value)

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
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices)


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
