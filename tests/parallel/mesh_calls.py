"""Run by test_mesh_matmul.py on eight devices: products on grids and lines, against whole ones."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import frugax
from tests.errors import assert_close


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def gemm(side):
    devices = np.array(jax.devices()[: side * side]).reshape(side, side)
    mesh = Mesh(devices, ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    a, b = normal(0, 3 * side, 5 * side), normal(1, 5 * side, 2 * side)
    grid = P("i", "j")
    f = functools.partial(frugax.parallel.mesh_gemm, axis_names=("i", "j"))
    f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=grid, out_specs=grid))
    assert_close(f(a, b), a @ b, "float32")
    loss = lambda f: lambda a, b: jnp.sum(jnp.sin(f(a, b)))  # noqa: E731
    got, want = (jax.grad(loss(g), (0, 1))(a, b) for g in (f, jnp.matmul))
    assert_close(got, want, "float32")
    text = f.lower(a, b).compile().as_text()
    assert "all-gather" not in text
    # Of the shifts, that is all but the two that align, none is longer than two hops.
    shifts = re.findall(r"collective-permute(?:-start)?\(.*?source_target_pairs=\{(.*?)\}\}", text)
    places = lambda pair: [divmod(int(n), side) for n in re.findall(r"\d+", pair)]  # noqa: E731
    hops = []
    for shift in shifts:
        ends = [places(pair) for pair in shift.split("},{")]
        hops.append(max(abs(x[0] - y[0]) + abs(x[1] - y[1]) for x, y in ends))
    assert sorted(hops)[: 2 * (side - 1)] == [min(side - 1, 2)] * (2 * (side - 1)), hops


def gemv(devices, levels):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("i",), axis_types=(AxisType.Auto,))
    x, w = normal(0, 3 * devices), normal(1, 3 * devices, 7)
    f = functools.partial(frugax.parallel.mesh_gemv, axis_name="i", levels=levels)
    f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=P("i")))
    every = f(x, w).reshape(devices, 7)  # each device's own copy of the sum
    for copy in every:
        assert_close(copy, x @ w, "float32")


if __name__ == "__main__":
    kind, *numbers = sys.argv[1:]
    {"gemm": gemm, "gemv": gemv}[kind](*map(int, numbers))
