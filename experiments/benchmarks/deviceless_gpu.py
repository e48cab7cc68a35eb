"""Compile for an H200 where there is none, and read what its kernels cost: registers, spills, shared memory.

Needs `jax-cuda13-plugin` (the `deviceless` extra), which brings the PTX assembler; no driver, no `ptxas`.
"""

import contextlib
import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from frugax.kernels.common.chips import target_config

H200 = target_config("h200")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The resources of a chip that one compiled kernel takes. `None`: the compiler did not say."""

    name: str
    registers: int | None  # a thread
    stack_bytes: int | None  # local memory a thread, spills included
    spill_stores: int | None  # bytes
    spill_loads: int | None  # bytes
    shared_bytes: int | None  # dynamic, a block
    threads: int | None  # a block
    wgmma: int  # instructions in the PTX


@functools.cache
def h200_mesh() -> Mesh:
    """A mesh of one H200 that is not here. Raises RuntimeError without the CUDA plugin."""
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
    except Exception as error:  # jax raises whatever its plugin loader met
        raise RuntimeError(
            "compiling for H200 needs the CUDA plugin: pip install jax-cuda13-plugin"
        ) from error
    return Mesh(np.array(topology.devices[:1]), ("x",))


def compile_for_h200(f: Callable[..., Any], *args: Any, **jit: Any) -> jax.stages.Compiled:
    """Compile `f` for one H200.

    Args:
      f: the function.
      *args: its arguments, pytrees of arrays or of `jax.ShapeDtypeStruct`; only shapes and dtypes are read.
      **jit: what `jax.jit` takes.

    Returns:
      The compiled program: `memory_analysis()`, `cost_analysis()`, `as_text()`; it can't run here.

    Raises:
      RuntimeError: no CUDA plugin is installed.
    """
    sharding = NamedSharding(h200_mesh(), PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    return jax.jit(f, **jit).lower(*args).compile()


@contextlib.contextmanager
def _dumping(folder: str) -> Iterator[None]:
    asked = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    before = {name: os.environ.get(name) for name in asked}
    os.environ.update(asked)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def kernels_for_h200(f: Callable[..., Any], *args: Any, keep: str | None = None) -> list[Kernel]:
    """Compile `f` for one H200 and report on each of its Mosaic GPU kernels.

    Args:
      f, *args: as in `compile_for_h200`.
      keep: a folder for the dumps (PTX, the assembler's messages, MLIR); None throws them away.

    Returns:
      One `Kernel` each, in the order of compilation. A kernel that this process has already compiled is
      cached and left out: a fresh process sees them all.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with _dumping(str(folder)):
            compile_for_h200(f, *args)
        return [_read(ptx) for ptx in sorted(folder.glob("*.ptx"), key=lambda path: path.stat().st_mtime)]


def _read(ptx: Path) -> Kernel:
    code = ptx.read_text()
    said = _text(ptx.with_suffix(".ptxas"))
    mlir = _text(ptx.with_suffix(".mlir-passes.log"))
    launch = re.findall(
        r"gpu\.launch_func .*?threads in \(%c(\d+).*?dynamic_shared_memory_size %c(\d+)_i32", mlir
    )
    threads, shared = map(int, launch[-1]) if launch else (None, None)
    return Kernel(
        name=ptx.stem,
        registers=_number(r"Used (\d+) registers", said),
        stack_bytes=_number(r"(\d+) bytes stack frame", said),
        spill_stores=_number(r"(\d+) bytes spill stores", said),
        spill_loads=_number(r"(\d+) bytes spill loads", said),
        shared_bytes=shared,
        threads=threads,
        wgmma=len(re.findall(r"wgmma\.mma_async", code)),
    )


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else None


def table(kernels: list[Kernel]) -> str:
    """The kernels as lines of text, one each under a heading."""
    fields = [field.name for field in dataclasses.fields(Kernel)]
    rows = [fields] + [[str(getattr(kernel, field)) for field in fields] for kernel in kernels]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)
