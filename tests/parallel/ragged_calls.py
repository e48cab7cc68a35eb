"""Run by test_experts.py on eight devices: ragged rows, by an emulated collective, against padded ones."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from frugax.parallel.exchange import exchange

DEVICES, N, PLACES, D = 8, 11, 3, 2


def ragged_all_to_all(x, out, starts, sizes, output_offsets, received, *, axis_name):
    """`jax.lax.ragged_all_to_all` by its documentation, from all devices' rows."""
    axis = jax.lax.axis_index(axis_name)
    every = jax.tree.map(lambda a: jax.lax.all_gather(a, axis_name), (x, starts, sizes, output_offsets))
    row = jnp.arange(len(out))
    for sender in range(DEVICES):
        rows, start, size, offset = (a[sender] for a in every)
        place = row - offset[axis]
        mine = (place >= 0) & (place < size[axis])
        out = jnp.where(mine[:, None], rows[jnp.clip(start[axis] + place, 0, len(rows) - 1)], out)
        received = received.at[sender].add(-size[axis])  # what is announced is what comes
    return jnp.where(jnp.all(received == 0), out, jnp.nan)


def run(transport):
    def local(x, counts, slots):
        way = exchange(counts[0], N, PLACES, ("a", "b"), transport)
        there, back = way.send(x), way.bring_back(slots)
        return there, back

    split = P(("a", "b"))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    f = jax.shard_map(local, mesh=mesh, in_specs=(split,) * 3, out_specs=(split,) * 2)

    def scalar(x, slots, counts):
        there, back = f(x, counts, slots)
        weigh = lambda y, seed: jnp.sum(y * jax.random.normal(jax.random.key(seed), y.shape))  # noqa: E731
        return weigh(there, 0) + weigh(back, 1), (there, back)

    rng = np.random.default_rng(0)
    counts = rng.multinomial(N - 2, rng.dirichlet(np.ones(DEVICES)), DEVICES).astype(np.int32)
    assert counts.max() > PLACES, "nothing is over the limit"
    x = rng.standard_normal((DEVICES * N, D)).astype(np.float32)
    slots = rng.standard_normal((DEVICES * DEVICES * PLACES, D)).astype(np.float32)
    results = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(x, slots, counts)
    return x, counts, results


if __name__ == "__main__":
    x, counts, padded = run("padded")
    with mock.patch.object(jax.lax, "ragged_all_to_all", ragged_all_to_all):
        _, _, ragged = run("ragged")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), padded, ragged)
    there = np.asarray(padded[0][1][0]).reshape(DEVICES, DEVICES, PLACES, D)
    for sender, start in enumerate(np.cumsum(counts, 1) - counts):
        for receiver in range(DEVICES):
            size = min(counts[sender, receiver], PLACES)
            rows = x[sender * N + start[receiver] :][:size]
            np.testing.assert_array_equal(there[receiver, sender, :size], rows)
            assert not there[receiver, sender, size:].any()
