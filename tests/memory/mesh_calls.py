"""Run by test_mesh.py on eight devices: a step with less memory over a mesh is the step of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import frugax
from experiments.trainer.state import init_state, make_train_step
from tests.errors import assert_close
from tests.parallel.steps import layout_of

V, ROWS, TIME = 24, 8, 16


def step(module, loss_tiles=1, **mesh):
    """The metrics and the moved params of one step of SGD."""
    layout, optimizer = layout_of(ROWS, **mesh), optax.sgd(1.0)
    state = layout.create(lambda: init_state(module, optimizer, 0, 0.0))
    random = np.random.default_rng(0)
    tokens = random.integers(V, size=(ROWS, TIME + 1)).astype(np.int32)
    ids = np.sort(random.integers(3, size=(ROWS, TIME)), axis=1).astype(np.int32)
    ones = np.ones((ROWS, TIME), np.float32)
    batch = dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=ids, weights=ones, bytes=ones)
    batch, before = layout.batch(batch), layout.whole(state.params)
    run = make_train_step(
        module, optimizer, accumulate=1, ema_decay=0.0, place_grads=layout.place_grads, loss_tiles=loss_tiles
    )
    state, metrics = layout.compile(run, state, batch)(state, batch)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), layout.whole(state.params), before)
    return jax.device_get(metrics), moved


def main() -> None:
    block = frugax.layers.Block("LightningAttention", "GLU", {"heads": 2}, {"expand": 2})
    module = frugax.layers.Decoder(V, 16, (block,), 2, tie_embeddings=False, backend="xla")
    want = step(module)
    less = module.clone(remat="dots_without_batch", offload=True, mlp_tiles=2)
    for mesh in ({"fsdp": 4, "sequence": 2}, {"data": 2, "fsdp": 2, "tensor": 2}):
        got = step(less, loss_tiles=3, **mesh)
        # A step's size is that of params, which round.
        assert_close(got, want, jnp.float32, times=4, name=str(mesh))


if __name__ == "__main__":
    main()
