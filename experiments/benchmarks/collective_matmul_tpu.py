"""Products in pieces beside their messages, compiled for four TPU chips that are not here: predicted times.

  python -m experiments.benchmarks.collective_matmul_tpu         a minute on a core; writes the JSON

Each beside the compiler's own collective, before or after one product of all rows. Times are the compiler's
cycles and the links' speed (`frugax.planner`); what waits is a message's time that no product hides.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import frugax
from experiments.benchmarks.interleaved import about, save
from frugax.planner import topology
from frugax.planner.program import parse
from frugax.planner.timing import times

RESULTS = Path(__file__).parent / "results" / "collective_matmul_tpu.json"
CHIPS = 4
# Slice, and rows, inner and columns of the product.
CASES = (
    ("v5e:2x2", (4096, 4096, 8192)),
    ("v5p:2x2x1", (8192, 4096, 8192)),
    ("v5p:2x2x1", (8192, 8192, 16384)),
    ("v6e:2x2", (8192, 8192, 8192)),
)
COLUMNS, ROWS = P(None, "tensor"), P("tensor")


def gathered(x: Array, w: Array, *, axis_name: str) -> Array:
    """All rows at once, then one product."""
    return jax.lax.all_gather(x, axis_name, axis=0, tiled=True) @ w


def scattered(x: Array, w: Array, *, axis_name: str) -> Array:
    """One product, then all sums at once."""
    return jax.lax.psum_scatter(x @ w, axis_name, scatter_dimension=0, tiled=True)


WAYS = {
    "gather": (gathered, frugax.parallel.all_gather_matmul),
    "scatter": (scattered, frugax.parallel.matmul_reduce_scatter),
}


def predict(kind: str, where: str, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Times of a step, whole and in pieces, in bfloat16."""
    M, K, N = shape
    chips = topology(where)
    mesh = frugax.parallel.make_mesh(data=1, tensor=CHIPS, devices=chips.devices[:CHIPS])
    if kind == "gather":
        ins, out, shapes = (ROWS, COLUMNS), COLUMNS, ((M, K), (K, N))
    else:
        ins, out, shapes = (COLUMNS, ROWS), ROWS, ((M, N), (N, K))
    args = [
        jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for size, spec in zip(shapes, ins, strict=True)
    ]

    def of(f: Any) -> Any:
        f = jax.shard_map(functools.partial(f, axis_name="tensor"), mesh=mesh, in_specs=ins, out_specs=out)
        return times(parse(jax.jit(f).lower(*args).compile().as_text()), mesh, chips)

    whole, pieces = WAYS[kind]
    return of(whole), of(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    out = parser.parse_args().out
    rows = []
    for where, shape in CASES:
        row: dict[str, Any] = {"slice": where, "rows": shape[0], "inner": shape[1], "columns": shape[2]}
        for kind in WAYS:
            whole, pieces = predict(kind, where, shape)
            row[kind] = {
                "whole_us": round(1e6 * whole.step, 1),
                "pieces_us": round(1e6 * pieces.step, 1),
                "waits_us": round(1e6 * pieces.exposed, 1),
            }
        rows.append(row)
    save(out, about() | {"chips": CHIPS, "dtype": "bfloat16", "rows": rows})


if __name__ == "__main__":
    main()
