"""`python -m tests.kernels.sharded OPERATION BACKEND TYPE` with eight devices: the numbers of one.

Batch lies on four of them, channels or heads on two; TYPE is that of the mesh's axes, Auto or Explicit.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.errors import assert_close

from .harness import OPERATIONS, Row, parts


def main(row: Row, backend: str | None, kind: AxisType) -> None:
    """Compare the gradient of a sharded call with that of a whole one."""
    arguments = row.arguments(row.placed)
    floats, arrays, static = parts(arguments)

    @jax.jit
    def loss_and_gradient(floats, arrays):
        def loss(floats):
            results = row.call(backend, **floats, **arrays, **static)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(results))

        return jax.value_and_grad(loss)(floats)

    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    batch, other = row.split
    on = {batch: "x", other: "y", "groups": "y"}  # groups of heads lie where their heads do

    def place(named):
        return {
            name: jax.device_put(
                x, NamedSharding(mesh, PartitionSpec(*map(on.get, row.axes_of(name, named).split())))
            )
            for name, x in named.items()
        }

    want = jax.device_get(loss_and_gradient(floats, arrays))
    with jax.set_mesh(mesh):
        placed = place(floats), place(arrays)
        compiled = loss_and_gradient.lower(*placed).compile()
        got = jax.device_get(compiled(*placed))
    assert_close(got, want, "float32", times=2)  # either may be off by one bound
    assert "all-gather" not in compiled.as_text()


if __name__ == "__main__":
    name, backend, kind = sys.argv[1:]
    main(OPERATIONS[name], None if backend == "None" else backend, AxisType[kind])
