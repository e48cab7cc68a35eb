"""Run with eight devices: batch and channels split over a mesh, one device's numbers, nothing gathered."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import frugax
from tests.errors import assert_close

from .cases import Case, split

PLACES = {
    "x": ("x", None, "y"), "dt": ("x", None, "y"), "z": ("x", None, "y"),
    "A": ("y",), "D": ("y",), "dt_bias": ("y",),
    "B": ("x",), "C": ("x",),
    "initial_state": ("x", "y"),
}  # fmt: skip


def main() -> None:
    floats, rest = split(Case(T=20, D=256, N=4, B=4, whole=True, state=True).arguments())
    ids = jnp.tile(jnp.arange(20) // 7, (4, 1))
    for backend in ("pallas_tpu", "xla", None):

        def loss(floats, ids, backend=backend):
            y, last = frugax.kernels.selective_scan(**floats, **rest, segment_ids=ids, backend=backend)
            return jnp.sum(jnp.sin(y)) + jnp.sum(last**2)

        f = jax.jit(jax.value_and_grad(loss))
        want = f(floats, ids)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
            args = {
                n: jax.device_put(v, NamedSharding(mesh, PartitionSpec(*PLACES[n])))
                for n, v in floats.items()
            }
            with jax.set_mesh(mesh):
                compiled = f.lower(
                    args, jax.device_put(ids, NamedSharding(mesh, PartitionSpec("x")))
                ).compile()
                got = compiled(args, jax.device_put(ids, NamedSharding(mesh, PartitionSpec("x"))))
            assert_close(jax.device_get(got), want, "float32", name=f"{backend} {kind}: ")
            assert "all-gather" not in compiled.as_text(), (backend, kind)


if __name__ == "__main__":
    main()
