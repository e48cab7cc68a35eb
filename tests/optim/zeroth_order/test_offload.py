"""ZO2: blocks that stay on the host take the steps of blocks in memory, and visit one at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.optim import zeroth_order as zo
from tests.devices import run_alone
from tests.errors import assert_close
from tests.optim.zeroth_order.models import WIDTH, blocks_of_a_network


@pytest.mark.full
def test_equals_mezo_in_memory_bit_for_bit():
    """Bits are promised as users compile, not under this suite's hurried flags."""
    run_alone("tests.optim.zeroth_order.bit_for_bit")


def test_one_trip_a_block_and_few_blocks_at_once(monkeypatch):
    functions, parts, batch = blocks_of_a_network()
    uploads, present = [], []
    put, size = jax.device_put, sum(x.nbytes for x in jax.tree.leaves(parts[1]))
    before = sum(x.nbytes for x in jax.live_arrays())

    def counted(block):
        uploads.append(sum(x.nbytes for x in jax.tree.leaves(block)))
        present.append(sum(x.nbytes for x in jax.live_arrays()) - before)
        return put(block)

    monkeypatch.setattr(jax, "device_put", counted)
    blocks, pending, info = zo.zo2_step(
        functions, parts, batch, jax.random.key(0), pending=None, learning_rate=0.1, epsilon=1e-3
    )
    assert len(uploads) == len(parts)
    assert sum(uploads) == sum(x.nbytes for x in jax.tree.leaves(parts))
    hidden = 4 * 16 * WIDTH * 4
    assert max(present) < 3 * size + hidden + 4096  # before the next one arrives
    # The step, which is in the blocks after the flush, is MeZO's along block i's own direction.
    monkeypatch.undo()
    after, key = zo.zo2_flush(blocks, pending), jax.random.fold_in(jax.random.key(0), 6)
    np.testing.assert_allclose(pending.scalar, -0.1 * info.slope, rtol=1e-6)
    z = jax.random.normal(jax.random.fold_in(key, 0), parts[6].shape, jnp.float32)
    assert_close(after[6] - parts[6], np.float64(pending.scalar) * np.asarray(z), "float32", times=10)
    assert_close(after[6], np.asarray(parts[6] + pending.scalar * z), "float32")


@pytest.mark.parametrize("kept", [pytest.param("bfloat16", marks=pytest.mark.full), "int8"])
def test_blocks_travel_in_few_bits_and_no_step_is_too_small(kept, monkeypatch):
    """Worked on in float32: the slope is that of the wide weights, and on average steps arrive whole."""
    functions = [lambda w, x: x @ w, lambda w, h: jnp.sum(h * w[None])]
    rng = np.random.default_rng(0)
    wide = [1 + rng.random((64, 8)).astype(np.float32), np.ones(8, np.float32)]

    def store(x):
        if kept == "bfloat16":
            return np.asarray(jnp.asarray(x, jnp.bfloat16))
        return jax.tree.map(np.asarray, frugax.formats.quantize(jnp.asarray(x), kept))

    def read(x):
        return np.asarray(x, np.float64) if kept == "bfloat16" else np.asarray(x.dequantize(), np.float64)

    blocks, sent, put = [store(x) for x in wide], [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x: (sent.extend(jax.tree.leaves(x)), put(x))[1])
    before, key, batch = [read(x) for x in blocks], jax.random.key(1), jnp.asarray(rng.random((2, 64)))
    step = dict(pending=None, learning_rate=1e-7, epsilon=1e-2, dtype=jnp.float32)
    blocks, pending, info = zo.zo2_step(functions, blocks, batch, key, **step)
    assert sum(x.nbytes for x in sent) < (0.51 if kept == "bfloat16" else 0.4) * sum(x.nbytes for x in wide)

    def loss(side):
        of_leaf = [jax.random.fold_in(jax.random.fold_in(key, i), 0) for i in range(2)]
        z = [np.asarray(jax.random.normal(k, x.shape, x.dtype)) for k, x in zip(of_leaf, wide, strict=True)]
        w, v = (x + side * 1e-2 * n for x, n in zip(before, z, strict=True))
        return np.sum(np.asarray(batch, np.float64) @ w * v), z[0]

    slope = (loss(1)[0] - loss(-1)[0]) / 2e-2
    assert_close(info.slope, slope, "float32", times=50)  # of losses of a thousand, a difference of some
    # A step below half of the format's: rounded at random, its mean over many keys is the step.
    pending = pending._replace(scalar=jnp.float32(5e-4))
    moved = []
    for i in range(15):
        noise = pending._replace(key=jax.random.key(i))
        new = zo.zo2_flush([blocks[0]], noise, dtype=jnp.float32)[0]
        assert jax.tree.structure(new) == jax.tree.structure(blocks[0])
        own = jax.random.fold_in(jax.random.fold_in(noise.key, 0), 0)
        z = np.asarray(jax.random.normal(own, (64, 8), jnp.float32))
        moved.append(np.sum((read(new) - before[0]) * z) / np.sum(z * z))
    assert abs(np.mean(moved) - 5e-4) < 3e-4
