"""The state that training carries from step to step, and the step."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.flatten_util
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
    collections: Any  # the model's variables that are no params, which steps change: {"router_state": ...}


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
    collections = dict(module.init(init_rng, jnp.zeros((1, 2), jnp.int32)))
    params = collections.pop("params")
    ema = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params) if ema_decay else None
    optimizer_state = optimizer.init(_widened(params) if rounding == "stochastic" else params)
    return TrainState(jnp.int32(0), params, optimizer_state, ema, rng, jnp.int32(0), collections)


def make_train_step(
    module,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int,
    ema_decay: float,
    skip: bool = False,
    rounding: str = "nearest",
    axis_name: str | tuple[str, ...] | None = None,
    place_grads: Callable[[Any], Any] = lambda grads: grads,
    loss_tiles: int = 1,
    pipeline: Callable[..., tuple[Array, dict[str, Array], Any, Any]] | None = None,
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Build the function that takes one optimizer step.

    Args:
      module: `module.apply(variables, tokens, state=None, segment_ids=None) -> (logits, state)`. The losses
        that it sows in "moe" (`frugax.layers.MoE`) are added to the cross entropy.
      accumulate: the batch goes through the model in this many parts, one after the other. Their gradients
        add up in float32.
      ema_decay: the share of the old average that each step keeps; 0 keeps none.
      skip: a step with a loss, gradient or update that is not finite changes nothing but the counts of steps.
      rounding: "nearest", or "stochastic": params in bfloat16 or float16 are rounded at random, so that small
        updates count on average, and the optimizer works in float32.
      axis_name: the axis, or axes, that `jax.pmap` or `jax.shard_map` map over; None where the compiler sees
        the whole batch.
      place_grads: says to the compiler where gradients belong (`Layout.place_grads`).
      loss_tiles: as in `token_losses`.
      pipeline: computes loss, report, gradients and collections of all parts, over stages of layers
        (`make_pipeline`).

    Returns:
      step(state, batch) -> (state, metrics). The batch is what `experiments.data.make_loader` yields. The
      loss is the mean cross entropy (nats a token) over all weights of all devices, so neither `accumulate`
      nor the number of devices changes it beyond rounding. But routers of experts balance the tokens that
      they see: those of a part, and with pmap those of a device. Models with such routers have the metrics
      "auxiliary_loss", which "loss" is without, and those of `frugax.moe.load_summary`.
    """

    def over_devices(x):
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def weighted_loss(params, collections, batch, total_weight, rng):
        variables, mutable = {"params": params, **collections}, ["moe", *collections]
        how = {"tiles": loss_tiles, "rngs": model_rngs(rng), "mutable": mutable}
        losses_BT, new = token_losses(module, variables, batch, **how)
        loss = jnp.sum(losses_BT * batch["weights"]) / total_weight
        sown = {n: x for n, x in new.items() if n not in collections}
        report = frugax.moe.load_summary(sown)
        if report:
            report["auxiliary_loss"] = frugax.moe.total_loss(sown)
        # Means over parts and devices, whose values add up.
        report = jax.tree.map(lambda x: x / (accumulate * over_devices(1)), report)
        return loss + report.get("auxiliary_loss", 0), (loss, report, {n: new[n] for n in collections})

    def step(state: TrainState, batch):
        step_rng = rng = jax.random.fold_in(state.rng, state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        total_weight = jnp.maximum(over_devices(jnp.sum(batch["weights"])), 1)

        def loss_and_gradient(collections, part, part_rng):
            gradient = jax.grad(weighted_loss, has_aux=True)
            grads, aux = gradient(state.params, collections, part, total_weight, part_rng)
            loss, report, collections = aux
            return (loss, report, _widened(grads)), collections

        if accumulate == 1 and pipeline is None:
            sums, collections = loss_and_gradient(state.collections, batch, rng)
        else:
            # Every accumulate-th row is one part, so that each part stays spread over all devices.
            parts = jax.tree.map(
                lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), dict(batch)
            )
            keys = jax.random.split(rng, accumulate) if accumulate > 1 else rng[None]
        if pipeline is not None:
            *sums, collections = pipeline(state.params, state.collections, parts, keys, total_weight)
        elif accumulate > 1:
            first = jax.tree.map(lambda x: x[0], parts)
            shapes, _ = jax.eval_shape(loss_and_gradient, state.collections, first, keys[0])
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def add(carry, part):
                sums, collections = carry
                more, collections = loss_and_gradient(collections, *part)
                return (jax.tree.map(jnp.add, sums, more), collections), None

            (sums, collections), _ = jax.lax.scan(add, (zeros, state.collections), (parts, keys))
        loss, report, grads = sums if axis_name is None else _summed(axis_name, sums)
        grads = place_grads(grads)
        if axis_name is not None:
            collections = jax.tree.map(functools.partial(_same, axis_name), collections)

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
            **report,
        }
        taken, skipped = state.step + 1, state.skipped
        if skip:
            finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, metrics.values()))
            params, optimizer_state, collections = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, optimizer_state, collections),
                (state.params, state.optimizer, state.collections),
            )
            skipped = skipped + ~finite
            metrics["skipped_steps"] = skipped
        ema = state.ema
        if ema is not None:
            ema = _averaged(ema, params, taken - skipped, ema_decay)
            if skip:
                ema = jax.tree.map(lambda new, old: jnp.where(finite, new, old), ema, state.ema)
        return TrainState(taken, params, optimizer_state, ema, state.rng, skipped, collections), metrics

    return step


def model_rngs(key: Array) -> dict[str, Array]:
    """The keys that a model draws with in training, from that of a part of a batch."""
    names = enumerate(("low_bit", "router"), 1)
    return {"dropout": key} | {name: jax.random.fold_in(key, i) for i, name in names}


def token_losses(
    module, variables, batch: Mapping[str, Array], *, tiles: int = 1, **how: Any
) -> tuple[Array, dict[str, Any]]:
    """The cross entropy of each token's target, and what the model says in its mutable collections.

    Args:
      module: as in `make_train_step`; for several tiles a `Decoder`, or a `LowBit` of one.
      variables: the model's.
      batch: "tokens", "targets" and "segment_ids" [B, T].
      tiles: the head and the loss see this many parts of time, one after the other, and again in the backward
        pass: there are no logits [B, T, V].
      how: what `module.apply` takes, with `mutable` among it.

    Returns:
      losses [B, T] in float32, and the collections.
    """
    args = variables, batch["tokens"]
    how["segment_ids"] = batch["segment_ids"]
    if tiles == 1:
        (logits_BTV, _), new = module.apply(*args, **how)
        return _cross_entropy(logits_BTV, batch["targets"]), new
    (x_BTD, _), new = module.apply(*args, hidden=True, **how)
    decoder, params = _decoder_of(module), variables["params"]
    read = "head" if "head" in params else "embedding"

    def losses(head, tile):
        x, targets = tile
        return _cross_entropy(decoder.apply({"params": {read: head}}, x, method="head"), targets)

    return frugax.memory.tiled_over_mesh(losses, params[read], (x_BTD, batch["targets"]), tiles), new


def _decoder_of(module) -> Any:
    return module.module if isinstance(module, frugax.quant.training.LowBit) else module


def _cross_entropy(logits: Array, targets: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def _summed(axis_name: str | tuple[str, ...], tree: Any) -> Any:
    """The sum over devices, in one message: between processes each costs as much as a thousand numbers."""
    joined, parted = jax.flatten_util.ravel_pytree(tree)
    return parted(jax.lax.psum(joined, axis_name))


def _same(axis_name: str | tuple[str, ...], x: Array) -> Array:
    """The mean over devices, so that all have the same; whole numbers are the same as they are."""
    return jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x


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


LOGITS = 2**25  # how many `bits_per_byte` has at a time: 128 MiB


@functools.partial(jax.jit, static_argnums=0)
def _nats(module, variables, batch):
    decoder = _decoder_of(module)
    if isinstance(decoder, frugax.layers.Decoder):
        tiles = -(-math.prod(batch["tokens"].shape) * decoder.vocab_size // LOGITS)
        losses_BT, _ = token_losses(module, variables, batch, tiles=tiles, mutable=[])
    else:
        logits_BTV, _ = module.apply(variables, batch["tokens"], segment_ids=batch["segment_ids"])
        losses_BT = _cross_entropy(logits_BTV, batch["targets"])
    return jnp.sum(losses_BT * batch["weights"])


def bits_per_byte(
    module,
    params,
    batches: Iterable[Mapping[str, Any]],
    stop: Callable[[], bool] = lambda: False,
    *,
    collections: Mapping[str, Any] | None = None,
) -> float | None:
    """Mean bits that a model spends on each byte of `batches` (of `heldout_batches`).

    Args:
      module: a hashable language model.
      params: its parameters.
      batches: dicts of arrays; every batch is of the same shape.
      stop: asked before each batch; once it is True the result is None.
      collections: its other variables, if it has some (`TrainState.collections`).
    """
    variables = {"params": params, **(collections or {})}
    total, size = 0.0, 0
    for batch in batches:
        if stop():
            return None
        total += float(_nats(module, variables, batch))
        size += int(batch["bytes"].sum())
    return total / math.log(2) / size
