"""Run by test_sharding.py in a process of eight virtual devices: a sharded call equals the whole one."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import frugax
from tests.errors import assert_close


def value_and_gradients(args, backend):
    def f(x, weight, bias, state):
        return frugax.kernels.causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, segment_ids=ids, backend=backend
        )

    out, vjp = jax.vjp(f, *args)
    return out, vjp(jax.tree.map(jnp.cos, out))


keys = jax.random.split(jax.random.key(0), 4)
shapes, specs = zip(
    ((4, 40, 256), P("batch", None, "channel")),
    ((4, 256), P(None, "channel")),
    ((256,), P("channel")),
    ((4, 3, 256), P("batch", None, "channel")),
    strict=True,
)
args = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
ids = jnp.cumsum(jax.random.bernoulli(jax.random.key(5), 0.2, (4, 40)), axis=1)
want = value_and_gradients(args, "reference")
mesh = jax.make_mesh((4, 2), ("batch", "channel"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
for backend in ("xla", "pallas_tpu"):
    program = jax.jit(value_and_gradients, static_argnums=1).lower(placed, backend).compile()
    got = program(placed)
    assert_close(got, want, jnp.float32, name=backend)
    assert got[0][0].sharding.is_equivalent_to(NamedSharding(mesh, specs[0]), 3)
    assert "all-gather" not in program.as_text(), f"{backend}: a whole array on every device"
