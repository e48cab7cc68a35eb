"""Run with eight devices: batch and heads split over a mesh, one device's numbers, nothing gathered."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import frugax
from tests.errors import assert_close

from .cases import Case, split


def main() -> None:
    x, rest = split(Case("lstm", B=4, T=6, H=2, D=8, state=True, packed=True).arguments())
    ids = rest["segment_ids"]
    specs = {
        "gates": ("x", None, "y"),
        "recurrent": ("y",),
        "bias": ("y",),
        "initial_state": ("x", None, "y"),
    }
    for backend in ("pallas_tpu", "xla"):

        def loss(x, ids, backend=backend):
            h, last = frugax.kernels.rnn(**x, segment_ids=ids, backend=backend)
            return jnp.sum(jnp.sin(h)) + jnp.sum(last**2)

        f = jax.jit(jax.value_and_grad(loss))
        want = jax.device_get(f(x, ids))
        for kind in (AxisType.Auto, AxisType.Explicit)[: 2 if backend == "pallas_tpu" else 1]:
            mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))

            def put(value, spec, mesh=mesh):
                return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))

            args = {name: put(value, specs[name]) for name, value in x.items()}, put(ids, ("x",))
            with jax.set_mesh(mesh):
                compiled = f.lower(*args).compile()
                got = compiled(*args)
            assert_close(jax.device_get(got), want, "float32", name=f"{backend} {kind}: ")
            assert "all-gather" not in compiled.as_text(), (backend, kind)


if __name__ == "__main__":
    main()
