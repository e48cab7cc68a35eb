"""The optimizer that a config describes: schedule, clipping, update rule, weight decay on matrices only."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

import frugax

# These add weight decay to the update as it is: it would not shrink with the learning rate.
_UNSCALED = ("adafactor", "adafactor_8bit")
# These take no mask, and estimate one step size from all leaves: leaves can't have rules of their own.
_INSEPARABLE = ("dadapt_adamw", "prodigy")


def schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warmup, then cosine decay to `final_fraction` of the peak at `steps`.

    Args:
      config: `config.optimizer`.
      steps: how long the whole run is.

    Raises:
      ValueError: the warmup is as long as the run.
    """
    if not 0 <= config.warmup_steps < steps:
        raise ValueError(
            f"optimizer.warmup_steps: got {config.warmup_steps}; expected 0 to {steps - 1} for {steps} steps"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / max(config.warmup_steps, 1),  # the first step counts
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_fraction,
    )


def is_matrix(path, param: jax.Array) -> bool:
    """Tell if a leaf is the matrix of a dense layer, stacked by a scan over depth or not."""
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel" and param.ndim >= 2


def matrices(params) -> dict:
    """A tree like `params`: True for matrices, False for all that the field does not decay.

    That is norms, biases, embeddings, convolutions, and a recurrence's A_log, D and dt_bias.
    """
    return jax.tree_util.tree_map_with_path(is_matrix, params)


def decayed(pattern: str) -> Callable[[Any], Any]:
    """Make the function from params to a tree of bools that says what decays.

    Args:
      pattern: a regular expression to be found in paths such as "blocks/gla/mixer/kernel"; empty: `matrices`.
    """
    if not pattern:
        return matrices
    found = re.compile(pattern)

    def mask(params):
        tree = jax.tree_util.tree_map_with_path(
            lambda path, _: bool(found.search(jax.tree_util.keystr(path, simple=True, separator="/"))), params
        )
        if not any(jax.tree.leaves(tree)):
            raise ValueError(f"optimizer.decay: got {pattern!r}; expected to find it in a param's path")
        return tree

    return mask


def _muon_axes(params):
    """Muon sees the last two axes of each matrix; what a scan stacks before them is a batch of matrices."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda matrix: axes if matrix else None, matrices(params))


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Build `config.optimizer` for a run of `steps` steps.

    Args:
      config: name: "muon" (matrices by Muon, the rest by AdamW) or any optimizer of `frugax.optim`, optax or
        optax.contrib that takes a learning rate; learning_rate, warmup_steps, final_fraction; weight_decay,
        and decay, which says of what; clip_norm (0: no clipping); options: what else the optimizer takes, by
        its own names. `moments` are the fields of `frugax.optim.EightBit`, with a regular expression for
        full_precision.

    Returns:
      The optimizer; its update takes the gradient and the params.

    Raises:
      ValueError: no optimizer has that name, or it doesn't take an option.
    """
    rate = schedule(config, steps)
    options = config.options.to_dict()
    build = _find(config.name)
    takes = inspect.signature(build).parameters
    unknown = sorted(set(options) - set(takes))
    if unknown:
        raise ValueError(
            f"optimizer.options.{unknown[0]}: got {options[unknown[0]]!r}; expected an argument of "
            f"{config.name}, which takes {', '.join(takes)}"
        )
    if config.name == "muon":
        # Muon's orthogonal update is scaled to AdamW's usual size: one learning rate can serve both halves.
        options = {"consistent_rms": 0.2, **options, "muon_weight_dimension_numbers": _muon_axes}
        if "ns_steps" in options and (not isinstance(options["ns_steps"], int) or options["ns_steps"] < 1):
            raise ValueError(f"optimizer.options.ns_steps: got {options['ns_steps']}; expected at least 1")
        if "adam_learning_rate" in options:  # a peak of its own, on the same schedule
            peak = options["adam_learning_rate"]
            if not isinstance(peak, int | float) or peak < 0:
                raise ValueError(f"optimizer.options.adam_learning_rate: got {peak}; expected at least 0")
            options["adam_learning_rate"] = lambda step: peak / config.learning_rate * rate(step)
    if isinstance(options.get("moments"), dict):
        options["moments"] = _eight_bit(options["moments"])
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    mask = decayed(config.get("decay", ""))
    try:
        return optax.chain(clip, _with_decay(build, takes, config, rate, mask, options))
    except Exception as error:  # a number where others take a schedule, an option of another type
        raise _named(config, error) from error


def _with_decay(build, takes, config, rate, mask, options) -> optax.GradientTransformation:
    """The update rule with weight decay on the masked leaves, in units of the learning rate."""
    decay = config.weight_decay
    options |= {name: mask for name in ("mask", "weight_decay_mask") if name in takes}
    if config.name in _UNSCALED:
        shrink = optax.add_decayed_weights(lambda step: -decay * rate(step), mask)
        return optax.chain(build(rate, **options), shrink if decay else optax.identity())
    if "weight_decay" not in takes:
        if decay:
            raise ValueError(f"optimizer.weight_decay: got {decay}; expected 0 for {config.name}")
        return build(rate, **options)
    if not decay or {"mask", "weight_decay_mask"} & set(takes):
        return build(rate, **options | {"weight_decay": decay})
    if config.name in _INSEPARABLE:
        raise ValueError(
            f"optimizer.weight_decay: got {decay}; expected 0 for {config.name}, which would decay norms and "
            "biases too"
        )
    rules = {on: build(rate, **options | {"weight_decay": decay * on}) for on in (True, False)}
    return optax.partition(rules, mask)


def _eight_bit(fields: dict[str, Any]) -> frugax.optim.EightBit:
    pattern = fields.get("full_precision")
    if isinstance(pattern, str):
        found = re.compile(pattern)
        fields = fields | {"full_precision": lambda path: bool(found.search(path))}
    try:
        return frugax.optim.EightBit(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.options.moments: {error}; see frugax.optim.EightBit") from error


def check_optimizer(config: ConfigDict, optimizer: optax.GradientTransformation, params: Any) -> None:
    """Trace one update on the shapes of `params`.

    Raises:
      ValueError: the optimizer asks for more than gradients and params, or an option does not suit them.
    """
    try:
        state = jax.eval_shape(optimizer.init, params)
        jax.eval_shape(optimizer.update, params, state, params)
    except Exception as error:  # each optimizer misses what it lacks in its own way
        raise _named(config, error) from error


def _named(config: ConfigDict, error: Exception) -> ValueError:
    """An optimizer's error with the field that it is about."""
    text = str(error)
    if isinstance(error, ValueError):
        about_option = text.partition(":")[0] in config.options
        known = text.startswith("optimizer.")
        return ValueError(text if known else f"optimizer.options{'.' if about_option else ': '}{text}")
    return ValueError(
        f"optimizer.name: got {config.name!r}; expected one that works from a schedule, gradients and params"
        f", with options of their right types ({type(error).__name__}: {text})"
    )


def _find(name: str):
    for home in (frugax.optim, optax, optax.contrib):
        build = getattr(home, name, None)
        is_function = callable(build) and not inspect.isclass(build)
        if is_function and "learning_rate" in inspect.signature(build).parameters:
            return build
    raise ValueError(
        f"optimizer.name: got {name!r}; expected 'adamw', 'muon' or another of frugax.optim or optax"
    )
