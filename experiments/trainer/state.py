"""The state that training carries from step to step, and the step."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import frugax


class TrainState(NamedTuple):
    """Everything a step reads and writes."""

    step: Array  # int32: how many batches were taken
    params: Any
    optimizer: Any  # the optimizer's state
    ema: Any  # float32 moving average of params, free of the params before the first step; None without one
    rng: Array  # the run's key; a step folds its number into it
    skipped: Array  # int32: how many of the steps were not finite, and changed nothing


def init_state(
    module,
    optimizer: optax.GradientTransformation,
    seed: int,
    ema_decay: float,
    *,
    rounding: str = "nearest",
) -> TrainState:
    """The state before the first step. Jit it, or `jax.eval_shape` it; arguments as in `make_train_step`."""
    init_rng, rng = jax.random.split(jax.random.key(seed))
    params = module.init(init_rng, jnp.zeros((1, 2), jnp.int32))["params"]
    ema = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params) if ema_decay else None
    optimizer_state = optimizer.init(_widened(params) if rounding == "stochastic" else params)
    return TrainState(jnp.int32(0), params, optimizer_state, ema, rng, jnp.int32(0))


def make_train_step(
    module,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int,
    ema_decay: float,
    skip: bool = False,
    rounding: str = "nearest",
    axis_name: str | None = None,
    place_grads: Callable[[Any], Any] = lambda grads: grads,
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Build the function that takes one optimizer step.

    Args:
      module: `module.apply(variables, tokens, state=None, segment_ids=None) -> (logits, state)`.
      accumulate: the batch goes through the model in this many parts, one after the other. Their gradients
        add up in float32.
      ema_decay: the share of the old average that each step keeps; 0 keeps none.
      skip: a step with a loss, gradient or update that is not finite changes nothing but the counts of steps.
      rounding: "nearest", or "stochastic": params in bfloat16 or float16 are rounded at random, so that small
        updates count on average, and the optimizer works in float32.
      axis_name: the axis that `jax.pmap` maps over; None where the compiler sees the whole batch.
      place_grads: says to the compiler where gradients belong (`Layout.place_grads`).

    Returns:
      step(state, batch) -> (state, metrics). The batch is what `experiments.data.make_loader` yields. The
      loss is the mean cross entropy (nats a token) over all weights of all devices, so neither `accumulate`
      nor the number of devices changes it beyond rounding.
    """

    def over_devices(x):
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def weighted_loss(params, batch, total_weight, rng):
        rngs = {"dropout": rng, "low_bit": jax.random.fold_in(rng, 1)}
        logits_BTV, _ = module.apply(
            {"params": params}, batch["tokens"], segment_ids=batch["segment_ids"], rngs=rngs
        )
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(
            logits_BTV.astype(jnp.float32), batch["targets"]
        )
        return jnp.sum(losses_BT * batch["weights"]) / total_weight

    def step(state: TrainState, batch):
        step_rng = rng = jax.random.fold_in(state.rng, state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        total_weight = jnp.maximum(over_devices(jnp.sum(batch["weights"])), 1)

        def loss_and_gradient(part, part_rng):
            loss, grads = jax.value_and_grad(weighted_loss)(state.params, part, total_weight, part_rng)
            return loss, _widened(grads)

        if accumulate == 1:
            loss_and_grads = loss_and_gradient(batch, rng)
        else:
            # Every accumulate-th row is one part, so that each part stays spread over all devices.
            parts = jax.tree.map(
                lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), dict(batch)
            )
            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, _widened(state.params)))
            loss_and_grads, _ = jax.lax.scan(
                lambda carry, part: (jax.tree.map(jnp.add, carry, loss_and_gradient(*part)), None),
                zeros,
                (parts, jax.random.split(rng, accumulate)),
            )
        loss, grads = over_devices(loss_and_grads)
        grads = place_grads(grads)

        if rounding == "stochastic":
            updates, optimizer_state = optimizer.update(grads, state.optimizer, _widened(state.params))
            # The same key on every device, so that all keep the same params.
            key = jax.random.fold_in(step_rng, 1)
            params = frugax.optim.apply_updates_stochastic(state.params, updates, key)
        else:
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "bits_per_byte": loss
            * total_weight
            / math.log(2)
            / jnp.maximum(over_devices(jnp.sum(batch["bytes"])), 1),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
        }
        taken, skipped = state.step + 1, state.skipped
        if skip:
            finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, metrics.values()))
            params, optimizer_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, optimizer_state),
                (state.params, state.optimizer),
            )
            skipped = skipped + ~finite
            metrics["skipped_steps"] = skipped
        ema = state.ema
        if ema is not None:
            ema = _averaged(ema, params, taken - skipped, ema_decay)
            if skip:
                ema = jax.tree.map(lambda new, old: jnp.where(finite, new, old), ema, state.ema)
        return TrainState(taken, params, optimizer_state, ema, state.rng, skipped), metrics

    return step


def _widened(tree):
    """Floating leaves in float32, or in their own dtype if that is wider."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _averaged(ema, params, count, decay: float):
    """The average after `count` steps that `optax.ema(decay, debias=True)` has: the zero it began with counts
    nothing."""
    share = (1 - decay) / -jnp.expm1(count * math.log(decay))
    return jax.tree.map(lambda mean, new: mean + share * (new.astype(jnp.float32) - mean), ema, params)


def params_to_use(state: TrainState) -> Any:
    """The params to evaluate and to sample with: an average of those trained, where the run keeps one."""
    if state.ema is not None:
        return state.ema
    is_free = lambda x: isinstance(x, optax.contrib.ScheduleFreeState)  # noqa: E731
    found = [x for x in jax.tree.leaves(state.optimizer, is_leaf=is_free) if is_free(x)]
    if not found:
        return state.params

    # `optax.partition` leaves MaskedNode where a leaf is another part's.
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731

    def merge(*parts):
        return next((x for x in parts if not is_masked(x)), parts[0])

    z = jax.tree.map(merge, *(x.z for x in found), is_leaf=is_masked)
    average = optax.contrib.schedule_free_eval_params(found[0]._replace(z=z), state.params)
    return jax.tree.map(lambda x, p: x.astype(p.dtype), average, state.params)


@functools.partial(jax.jit, static_argnums=0)
def _nats(module, params, batch):
    logits_BTV, _ = module.apply({"params": params}, batch["tokens"], segment_ids=batch["segment_ids"])
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(
        logits_BTV.astype(jnp.float32), batch["targets"]
    )
    return jnp.sum(losses_BT * batch["weights"])


def bits_per_byte(
    module, params, batches: Iterable[Mapping[str, Any]], stop: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean bits that a model spends on each byte of `batches` (of `heldout_batches`).

    Args:
      module: a hashable language model.
      params: its parameters.
      batches: dicts of arrays; every batch is of the same shape.
      stop: asked before each batch; once it is True the result is None.
    """
    total, size = 0.0, 0
    for batch in batches:
        if stop():
            return None
        total += float(_nats(module, params, batch))
        size += int(batch["bytes"].sum())
    return total / math.log(2) / size
