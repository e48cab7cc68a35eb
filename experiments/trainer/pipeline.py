"""Gradients of a training step whose layers are split over `mesh.pipeline` stages."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

import frugax
from experiments.trainer.state import model_rngs


def make_pipeline(
    config: ConfigDict, module: Any
) -> Callable[..., tuple[Array, dict[str, Array], Any, Any]] | None:
    """Build the gradients of a step for `config.mesh.pipeline` devices; None for one.

    Returns:
      gradients(params, collections, parts, keys, total_weight) -> loss, report, gradients, new collections,
      as `make_train_step` takes it: what the sum over the parts of a batch is without a pipeline.

    Raises:
      ValueError: stages don't divide the layers, or the parts.
    """
    devices, chunks, parts = config.mesh.pipeline, config.pipeline.chunks, config.accumulate
    if devices == 1:
        if chunks > 1:
            raise ValueError(f"pipeline.chunks: got {chunks}; expected 1 for mesh.pipeline=1")
        return None
    said = f"mesh.pipeline={devices}" + (f" times pipeline.chunks={chunks}" if chunks > 1 else "")
    if config.model.repeats % (devices * chunks):
        raise ValueError(
            f"model.repeats: got {config.model.repeats}; expected a multiple of {devices * chunks}, {said}"
        )
    if chunks > 1 and parts % devices:
        raise ValueError(
            f"accumulate: got {parts}; expected a multiple of mesh.pipeline={devices} for "
            f"pipeline.chunks={chunks}"
        )
    schedule = frugax.parallel.pipeline_schedule(devices, parts, chunks=chunks, in_step=True)

    def losses_of(head, hidden, targets):
        logits_BTV = head(hidden)
        # Not by an index: in a program with a manual axis, XLA's partitioner ends the process where it looks
        # up logits that are split by vocabulary (jax 0.10.2).
        is_target = jnp.arange(logits_BTV.shape[-1])[None, None] == targets[..., None]
        of_target_BT = jnp.where(is_target, logits_BTV, 0).sum(-1)
        return jax.nn.logsumexp(logits_BTV, axis=-1) - of_target_BT

    def last(head, hidden, part):
        tiles = config.memory.loss_tiles
        if tiles == 1:
            losses_BT = losses_of(head, hidden, part["targets"])
        else:
            losses_BT = frugax.memory.tiled(
                lambda tile: losses_of(head, *tile), (hidden, part["targets"]), tiles
            )
        loss = (losses_BT * part["weights"]).sum()
        return loss, {"loss": loss}

    # Without few bits a stage's layers are applied as they are.
    decoder, in_few_bits = module, {}
    if config.model.low_bit:
        decoder = module.module
        in_few_bits = {"layers_as": lambda layers: module.clone(module=layers, parent=None)}
    cut = frugax.models.decoder_stages(decoder, devices * chunks, last, **in_few_bits)

    def stage(*args):
        x, auxiliary, report, carried = cut.stage(*args)
        if report:
            report = {"auxiliary_loss": auxiliary, **report}
        # Means over the parts, whose values add up.
        return x, auxiliary / parts, jax.tree.map(lambda mean: mean / parts, report), carried

    def gradients(
        params: Any,
        collections: Mapping[str, Any],
        batch: Mapping[str, Array],
        keys: Array,
        total_weight: Array,
    ):
        microbatches = {
            "tokens": batch["tokens"],
            "targets": batch["targets"],
            "segment_ids": batch["segment_ids"],
            "weights": batch["weights"] / total_weight,
            "rngs": jax.vmap(model_rngs)(keys),
        }
        shared, layers = cut.split(params)
        found = frugax.parallel.pipeline_gradients(
            cut.first,
            stage,
            cut.last,
            shared,
            layers,
            microbatches,
            carried={name: of["layers"] for name, of in collections.items()},
            schedule=schedule,
        )
        after = {name: {"layers": of} for name, of in found.carried.items()}
        return found.of_last["loss"], found.of_stages, cut.join(*found.gradients), after

    return gradients
