"""The state that training carries from step to step, and the step."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class TrainState(NamedTuple):
    """Everything a step reads and writes."""

    step: Array  # int32: how many steps were taken
    params: Any
    optimizer: Any  # the optimizer's state
    ema: Any  # exponential moving average of params; None without one
    rng: Array  # the run's key; a step folds its number into it


def init_state(module, optimizer: optax.GradientTransformation, seed: int, ema_decay: float) -> TrainState:
    """The state before the first step. Jit it, or `jax.eval_shape` it."""
    init_rng, rng = jax.random.split(jax.random.key(seed))
    params = module.init(init_rng, jnp.zeros((1, 2), jnp.int32))["params"]
    ema = jax.tree.map(jnp.copy, params) if ema_decay else None  # a copy: both are donated to the next step
    return TrainState(jnp.int32(0), params, optimizer.init(params), ema, rng)


def make_train_step(
    module,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int,
    ema_decay: float,
    axis_name: str | None = None,
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Build the function that takes one optimizer step.

    Args:
      module: `module.apply(variables, tokens, state=None, segment_ids=None) -> (logits, state)`.
      accumulate: the batch goes through the model in this many parts, one after the other.
      ema_decay: the share of the old average that each step keeps; 0 keeps none.
      axis_name: the axis that `jax.pmap` maps over; None where the compiler sees the whole batch.

    Returns:
      step(state, batch) -> (state, metrics). The batch is what `experiments.data.make_loader` yields. The
      loss is the mean cross entropy (nats a token) over all weights of all devices, so neither `accumulate`
      nor the number of devices changes it beyond rounding.
    """

    def over_devices(x):
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def weighted_loss(params, batch, total_weight, rng):
        logits_BTV, _ = module.apply(
            {"params": params}, batch["tokens"], segment_ids=batch["segment_ids"], rngs={"dropout": rng}
        )
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(
            logits_BTV.astype(jnp.float32), batch["targets"]
        )
        return jnp.sum(losses_BT * batch["weights"]) / total_weight

    def step(state: TrainState, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        total_weight = jnp.maximum(over_devices(jnp.sum(batch["weights"])), 1)

        def add_part(carry, part_and_rng):
            part, part_rng = part_and_rng
            gradient = jax.value_and_grad(weighted_loss)(state.params, part, total_weight, part_rng)
            return jax.tree.map(jnp.add, carry, gradient), None

        if accumulate == 1:
            loss_and_grads = jax.value_and_grad(weighted_loss)(state.params, batch, total_weight, rng)
        else:
            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
            # Every accumulate-th row is one part, so that each part stays spread over all devices.
            parts = jax.tree.map(
                lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), dict(batch)
            )
            loss_and_grads, _ = jax.lax.scan(add_part, zeros, (parts, jax.random.split(rng, accumulate)))
        loss, grads = over_devices(loss_and_grads)

        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - ema_decay) if ema_decay else None
        metrics = {
            "loss": loss,
            "bits_per_byte": loss
            * total_weight
            / math.log(2)
            / jnp.maximum(over_devices(jnp.sum(batch["bytes"])), 1),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
        }
        return TrainState(state.step + 1, params, optimizer_state, ema, state.rng), metrics

    return step


def bits_per_byte(module, params, batches) -> float:
    """Mean bits that the model spends on each byte of `batches` (of `heldout_batches`)."""

    @jax.jit
    def nats(params, batch):
        logits_BTV, _ = module.apply({"params": params}, batch["tokens"], segment_ids=batch["segment_ids"])
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["targets"])
        return jnp.sum(losses_BT * batch["weights"])

    total = sum(float(nats(params, batch)) for batch in batches)
    return total / math.log(2) / sum(int(batch["bytes"].sum()) for batch in batches)
