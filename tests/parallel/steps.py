"""The trainer's step over devices of any platform: compiled from shapes alone, with the bytes it sends."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import frugax
from experiments.configs.defaults import defaults
from experiments.trainer.parallel import Layout, make_layout
from experiments.trainer.state import TrainState, init_state, make_train_step
from frugax.planner.hlo import Collective, collectives


def config_of(rows: int, *, accumulate: int = 1, repeats: int = 2, **mesh: int) -> ConfigDict:
    """A config for a batch of so many rows, by the fields of `config.mesh`."""
    config = defaults()
    config.batch_size, config.accumulate, config.model.repeats = rows, accumulate, repeats
    config.ema_decay, config.skip_nonfinite = 0.0, 0
    config.mesh.data = 1
    config.mesh.update(mesh)
    return config


def layout_of(rows: int, devices=None, **mesh: int) -> Layout:
    """The trainer's layout of such a config."""
    return make_layout(config_of(rows, **mesh), devices)


class Compiled(NamedTuple):
    """A step: its program, the shapes of its state, and what it sends."""

    program: jax.stages.Compiled
    state: TrainState
    collectives: list[Collective]

    @property
    def params(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.state.params))


def compile_step(
    block: frugax.layers.Block,
    *,
    devices=None,
    width: int = 64,
    repeats: int = 2,
    vocab: int = 32,
    rows: int = 8,
    time: int = 16,
    dtype: Any = jnp.float32,
    **mesh: int,
) -> Compiled:
    """Compile a step of AdamW on a decoder, over a mesh of `devices` (None: those there are)."""
    layout = layout_of(rows, devices, **mesh)
    module = frugax.layers.Decoder(
        vocab, width, (block,), repeats, tie_embeddings=False, backend="xla", dtype=dtype
    )
    optimizer = optax.adamw(1e-2)
    state = layout.abstract(lambda: init_state(module, optimizer, 0, 0.0))
    kinds = dict.fromkeys(("tokens", "targets", "segment_ids"), jnp.int32)
    kinds |= dict.fromkeys(("weights", "bytes"), jnp.float32)
    batch = {name: jax.ShapeDtypeStruct((rows, time), kind) for name, kind in kinds.items()}
    step = make_train_step(module, optimizer, accumulate=1, ema_decay=0.0, place_grads=layout.place_grads)
    program = layout.compile(step, state, layout.abstract_batch(batch))
    sizes = {name: mesh.get(name, 1) for name in frugax.parallel.AXES}
    return Compiled(program, state, collectives(program.as_text(), sizes))
