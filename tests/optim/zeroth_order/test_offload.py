"""ZO2: blocks that stay on the host take the steps of blocks in memory, and visit one at a time."""

import jax

from frugax.optim import zeroth_order as zo
from tests.devices import run_alone
from tests.optim.zeroth_order.models import WIDTH, blocks_of_a_network


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
    zo.zo2_step(functions, parts, batch, jax.random.key(0), pending=None, learning_rate=0.1, epsilon=1e-3)
    assert len(uploads) == len(parts)
    assert sum(uploads) == sum(x.nbytes for x in jax.tree.leaves(parts))
    hidden = 4 * 16 * WIDTH * 4
    assert max(present) < 3 * size + hidden + 4096  # before the next one arrives
