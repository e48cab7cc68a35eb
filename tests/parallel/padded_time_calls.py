"""Run by test_over_time.py on eight devices: padded rows and states of documents where time is split."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import frugax
from frugax.parallel import BATCH_AXES, make_mesh
from tests.errors import assert_close
from tests.parallel.mixer_time_calls import SEGMENTS, B, D, T

LENGTHS = jnp.array([64, 37, 1, 48])  # one ends with a shard, one has shards without a token
PADDED, PACKED = {"lengths": LENGTHS}, {"segment_ids": SEGMENTS}
CASES = [
    (frugax.layers.SlidingWindowAttention(window=21, heads=2), PADDED, None),
    (frugax.layers.SlidingWindowAttention(window=21, heads=2), PACKED, 3),
    (frugax.layers.Based(key_size=2, window=6), PADDED | PACKED, 3),
    (frugax.layers.MoE(experts=4, k=2, expert_axis="sequence"), PADDED, None),
    (frugax.layers.MoE(experts=4, k=2), PADDED, None),
]


def main():
    mesh = make_mesh(data=2, sequence=4)
    x, weight = jax.random.normal(jax.random.key(0), (2, B, T, D))
    for layer, rows, states in CASES:
        how = {} if states is None else {"segment_states": states}
        params = jax.jit(layer.init)(jax.random.key(1), x)

        def loss(params, x, rows, layer, how):
            if isinstance(layer, frugax.layers.MoE):
                y, sown = layer.apply(params, x, **rows, mutable=["moe"])
                return jnp.sum(y * weight) + frugax.moe.total_loss(sown), y
            y, state = layer.apply(params, x, **rows, **how)
            floats = [s for s in jax.tree.leaves(state) if jnp.issubdtype(s.dtype, jnp.floating)]
            return jnp.sum(y * weight) + sum(jnp.sum(s * jnp.cos(s)) for s in floats), (y, floats)

        run = jax.value_and_grad(functools.partial(loss, layer=layer, how=how), (0, 1), has_aux=True)
        want = jax.jit(run)(params, x, rows)
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, NamedSharding(mesh, P(BATCH_AXES, "sequence")))
            got = jax.jit(run)(params, placed, rows)
        # The weighted sum of results cancels, so its relative error says nothing.
        assert_close((got[0][1], got[1]), (want[0][1], want[1]), "float32", name=type(layer).__name__)


if __name__ == "__main__":
    main()
