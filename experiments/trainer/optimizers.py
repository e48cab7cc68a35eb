"""The optimizer that a config describes: schedule, clipping, update rule, weight decay on matrices only."""

import inspect

import jax
import optax
from ml_collections import ConfigDict

import frugax


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
    """Whether a leaf is the matrix of a dense layer, stacked by a scan over depth or not."""
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel" and param.ndim >= 2


def matrices(params) -> dict:
    """A tree like `params`: True for matrices, False for norms, biases, convolutions and embeddings."""
    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _muon_axes(params):
    """Muon sees the last two axes of each matrix; what a scan stacks before them is a batch of matrices."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda matrix: axes if matrix else None, matrices(params))


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Build `config.optimizer` for a run of `steps` steps.

    Args:
      config: name: "muon" (matrices by Muon, the rest by AdamW) or any optimizer of `frugax.optim`, optax or
        optax.contrib that takes a learning rate; learning_rate, warmup_steps, final_fraction, weight_decay,
        clip_norm (0: no clipping); options: what else the optimizer takes, by its own names.

    Returns:
      The optimizer; its update takes the gradient and the params.

    Raises:
      ValueError: no optimizer has that name, or it doesn't take an option.
    """
    rate = schedule(config, steps)
    options = dict(config.options)
    build = _find(config.name)
    takes = inspect.signature(build).parameters
    unknown = sorted(set(options) - set(takes))
    if unknown:
        raise ValueError(
            f"optimizer.options: {config.name} takes no {', '.join(unknown)}; expected {', '.join(takes)}"
        )
    if config.name == "muon":
        # Muon's orthogonal update is scaled to AdamW's usual size: one learning rate can serve both halves.
        options = {"consistent_rms": 0.2, **options, "muon_weight_dimension_numbers": _muon_axes}
        if "adam_learning_rate" in options:  # a peak of its own, on the same schedule
            ratio = options["adam_learning_rate"] / config.learning_rate
            options["adam_learning_rate"] = lambda step: ratio * rate(step)
    if config.weight_decay:
        if "weight_decay" not in takes:
            raise ValueError(f"optimizer.weight_decay: {config.name} takes none; expected 0")
        options["weight_decay"] = config.weight_decay
    for name in ("mask", "weight_decay_mask"):
        if name in takes:
            options[name] = matrices
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, build(rate, **options))


def _find(name: str):
    for home in (frugax.optim, optax, optax.contrib):
        build = getattr(home, name, None)
        if callable(build) and "learning_rate" in inspect.signature(build).parameters:
            return build
    raise ValueError(
        f"optimizer.name: got {name!r}; expected 'adamw', 'muon' or another of frugax.optim or optax"
    )
