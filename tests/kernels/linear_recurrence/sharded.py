"""Run with eight devices: batch and channels split over a mesh, one device's numbers, nothing gathered."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import frugax
from tests.errors import assert_close


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    a = jax.random.uniform(keys[0], (4, 50, 256))
    b = jax.random.normal(keys[1], a.shape)
    state = jax.random.normal(keys[2], (4, 256))
    ids = jnp.tile(jnp.arange(50) // 17, (4, 1))
    for backend in ("pallas_tpu", "xla"):

        def loss(a, b, state, ids, backend=backend):
            h, last = frugax.kernels.linear_recurrence(
                a, b, initial_state=state, segment_ids=ids, backend=backend
            )
            return jnp.sum(jnp.sin(h)) + jnp.sum(last**2)

        f = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        want = f(a, b, state, ids)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
            places = (("x", None, "y"), ("x", None, "y"), ("x", "y"), ("x",))
            args = [
                jax.device_put(value, NamedSharding(mesh, PartitionSpec(*place)))
                for value, place in zip((a, b, state, ids), places, strict=True)
            ]
            with jax.set_mesh(mesh):
                compiled = f.lower(*args).compile()
                got = compiled(*args)
            assert_close(jax.device_get(got), want, "float32", name=f"{backend} {kind}: ")
            assert "all-gather" not in compiled.as_text(), (backend, kind)


if __name__ == "__main__":
    main()
