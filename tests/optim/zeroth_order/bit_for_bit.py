"""Equal bits, compiled as users compile: `python -m tests.optim.zeroth_order.bit_for_bit`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from frugax.optim import zeroth_order as zo
from tests.optim.zeroth_order.models import blocks_of_a_network


def offload():
    """ZO2's steps from host memory are MeZO's in memory."""
    functions, parts, batch = blocks_of_a_network()
    keys = jax.random.split(jax.random.key(0), 4)

    # Part by part, as the chain runs: XLA would fuse a whole step otherwise, and round otherwise.
    @jax.jit
    def move(part, key, i, amount):
        return zo.displace(part, jax.random.fold_in(key, i), amount)

    passes = {f: jax.jit(f) for f in functions}

    def loss(parts, key, epsilon):
        h = batch
        for i, (f, part) in enumerate(zip(functions, parts, strict=True)):
            h = passes[f](move(part, key, i, epsilon), h)
        return h

    memory, scalars = [jax.tree.map(jnp.asarray, p) for p in parts], []
    for key in keys:
        slope = (loss(memory, key, 1e-3) - loss(memory, key, -1e-3)) / (2 * 1e-3)
        scalars.append(-0.05 * slope)
        memory = [move(p, key, i, scalars[-1]) for i, p in enumerate(memory)]

    blocks, pending, losses = parts, None, []
    for key in keys:
        blocks, pending, info = zo.zo2_step(
            functions, blocks, batch, key, pending=pending, learning_rate=0.05, epsilon=1e-3
        )
        losses.append(float(info.loss))
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(blocks))
    np.testing.assert_array_equal(pending.scalar, scalars[-1])
    chex.assert_trees_all_equal(zo.zo2_flush(blocks, pending), memory)
    assert losses[-1] != losses[0]


if __name__ == "__main__":
    offload()
