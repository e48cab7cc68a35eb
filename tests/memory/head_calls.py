"""Run by test_mesh.py on eight devices: a head in tiles over shared rows and time travels once each way."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import frugax
from frugax.parallel import BATCH_AXES, make_mesh
from frugax.planner.hlo import collectives
from tests.errors import assert_close

B, T, D, V, TILES = 8, 22, 16, 24, 5  # a shard of 11 tokens: five tiles of 2, and one more token


def losses(head_VD, tile):
    x_BTD, targets_BT = tile
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, head_VD, precision="highest")
    is_target = jnp.arange(V)[None, None] == targets_BT[..., None]
    return jax.nn.logsumexp(logits_BTV, -1) - jnp.where(is_target, logits_BTV, 0).sum(-1)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    head, x = jax.random.normal(keys[0], (V, D)), jax.random.normal(keys[1], (B, T, D))
    args = head, x, jax.random.randint(keys[2], (B, T), 0, V)

    def total(over, head, x, targets):
        found = over(head, (x, targets))
        return jnp.sum(found * jnp.arange(1.0, T + 1)[None]), found

    run = jax.value_and_grad(lambda *args: total(losses, *args), (0, 1), has_aux=True)
    want = jax.jit(run)(*args)
    over = lambda head, tile: frugax.memory.tiled_over_mesh(losses, head, tile, TILES)  # noqa: E731
    run = jax.value_and_grad(lambda *args: total(over, *args), (0, 1), has_aux=True)
    assert_close(jax.jit(run)(*args), want, "float32")  # without a mesh
    for sizes in ({"fsdp": 4, "sequence": 2}, {"fsdp": 4, "tensor": 2}):
        mesh = make_mesh(data=1, **sizes)
        places = P("fsdp"), P(BATCH_AXES, "sequence"), P(BATCH_AXES, "sequence")
        placed = [jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip(args, places, strict=True)]
        with jax.set_mesh(mesh):
            compiled = jax.jit(run).lower(*placed).compile()
        assert_close(compiled(*placed), want, "float32", name=str(sizes))
        sent = [c for c in collectives(compiled.as_text(), mesh) if c.payload_bytes >= head.nbytes]
        if "tensor" not in sizes:
            assert all(c.times == 1 for c in sent), sent
            assert sorted(c.kind for c in sent) == ["all-gather", "all-reduce"], sent


if __name__ == "__main__":
    main()
