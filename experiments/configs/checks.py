"""Values that each field of a config may have, checked before anything runs."""

import math
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from frugax.memory import POLICIES
from frugax.parallel.activations import TENSOR_MESSAGES


class Field(NamedTuple):
    """Values that a field may have, and the words for them."""

    right: Callable[[Any], bool]
    expected: str


def _is_integer(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def integer(least: int, *, also: int | None = None) -> Field:
    """An integer of at least `least`, or `also`."""
    words = f"an integer of at least {least}" + (f", or {also}" if also is not None else "")
    return Field(lambda x: _is_integer(x) and (x >= least or x == also), words)


def number(least: float, below: float = math.inf, *, open_below: bool = False) -> Field:
    """A finite number from `least` on, without it if `open_below`, and smaller than `below`."""

    def right(x):
        if not isinstance(x, numbers.Real) or isinstance(x, bool) or not math.isfinite(x):
            return False
        return (x > least if open_below else x >= least) and x < below

    above = f"above {least}" if open_below else f"of at least {least}"
    return Field(right, f"a finite number {above}" + (f" and below {below}" if below < math.inf else ""))


def one_of(*values: str) -> Field:
    """One of these strings."""
    return Field(lambda x: x in values, " or ".join(map(repr, values)))


def _is_pattern(x: Any) -> bool:
    try:
        return isinstance(x, str) and bool(re.compile(x))
    except re.error:
        return False


def _is_floating(x: Any) -> bool:
    return x in ("float32", "bfloat16", "float16", "float64")


TEXT = Field(lambda x: isinstance(x, str), "a string")
SWITCH = Field(lambda x: isinstance(x, bool | np.bool_), "True or False")
FLOATING = Field(_is_floating, "'float32', 'bfloat16', 'float16' or 'float64'")
NAMES = Field(
    lambda x: isinstance(x, tuple | list) and len(x) > 0 and all(isinstance(y, str) for y in x),
    "names of model.blocks, at least one",
)

OPTIMIZER = {
    "name": TEXT,
    "learning_rate": number(0, open_below=True),
    "warmup_steps": integer(0),
    "final_fraction": number(0),
    "weight_decay": number(0),
    "decay": Field(_is_pattern, "a regular expression, or nothing"),
    "rounding": one_of("nearest", "stochastic"),
    "clip_norm": number(0),
}

TRAINING = {
    "run_dir": TEXT,
    "seed": integer(0),
    "steps": integer(1),
    "batch_size": integer(1),
    "accumulate": integer(1),
    "ema_decay": number(0, below=1),
    "skip_nonfinite": integer(0),
    "log_every": integer(0),
    "tensorboard": SWITCH,
    "parallel": one_of("jit", "pmap"),
    **{
        f"mesh.{axis}": integer(1, also=-1)
        for axis in ("slice", "data", "fsdp", "expert", "sequence", "tensor")
    },
    "mesh.pipeline": integer(1),
    "pipeline.chunks": integer(1),
    "mesh.tensor_messages": one_of(*TENSOR_MESSAGES),
    "mesh.zero": one_of(0, 1, 2, 3),
    "distributed.enabled": SWITCH,
    "distributed.coordinator": TEXT,
    "distributed.processes": integer(0),
    "distributed.process": integer(-1),
    "distributed.timeout": integer(1),
    "data.path": TEXT,
    "data.tokenizer": TEXT,
    "data.sequence_length": integer(1),
    "data.held_out": number(0, below=1),
    "model.vocab_size": integer(0),
    "model.width": integer(1),
    "model.repeats": integer(1),
    "model.pattern": NAMES,
    "model.tie_embeddings": SWITCH,
    "model.ternary_head": SWITCH,
    "model.remat": SWITCH,
    "model.unroll": SWITCH,
    "model.dtype": FLOATING,
    "model.param_dtype": FLOATING,
    "model.backend": TEXT,
    "model.low_bit": TEXT,
    "memory.remat": one_of("", *POLICIES),
    "memory.offload": SWITCH,
    "memory.loss_tiles": integer(1),
    "memory.mlp_tiles": integer(1),
    **{f"optimizer.{name}": field for name, field in OPTIMIZER.items()},
    "checkpoint.every": integer(0),
    "checkpoint.keep": integer(1),
    "evaluation.enabled": SWITCH,
    "evaluation.every": integer(0),
    "evaluation.batch_size": integer(1),
    "evaluation.sequence_length": integer(1),
    "evaluation.max_bytes": integer(0),
    "sample.prompt": TEXT,
    "sample.tokens": integer(0),
    "sample.temperature": number(0),
}

CLASSIFICATION = {
    "run_dir": TEXT,
    "task": one_of("digits", "vowels", "selective_copying", "induction_heads", "parity"),
    "task_args.train": integer(1),
    "task_args.held_out": integer(1),
    "task_args.length": integer(3),
    "task_args.copied": integer(1),
    "task_args.symbols": integer(1),
    "task_args.seed": integer(0),
    "task_args.longer": Field(
        lambda x: isinstance(x, tuple | list) and all(_is_integer(y) and y > 0 for y in x), "positive lengths"
    ),
    "seed": integer(0),
    "steps": integer(1),
    "batch_size": integer(1),
    **{f"optimizer.{name}": field for name, field in OPTIMIZER.items()},
}

# What the optimizer takes, and what the layers take, is theirs to say, once they are built.
_FREE = ("optimizer.options.", "model.blocks.", "models.")


def check_config(config: ConfigDict) -> None:
    """Raise ValueError naming the first field of a training config that is missing or can't be right."""
    check_fields(config, TRAINING, required=True)
    warmup, steps = config.optimizer.warmup_steps, config.steps
    if warmup >= steps:
        raise ValueError(f"optimizer.warmup_steps: got {warmup}; expected 0 to {steps - 1} for {steps} steps")
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"batch_size: got {config.batch_size}; expected a multiple of {config.accumulate} (accumulate)"
        )
    remat = remat_name(config)
    if config.memory.offload and remat not in ("full", "dots_without_batch"):
        raise ValueError(
            f"memory.offload: got True with {remat!r}; expected memory.remat 'full' or 'dots_without_batch'"
        )


def remat_name(config: ConfigDict) -> str:
    """The policy that a config names: `memory.remat`, or what `model.remat` says where that is empty."""
    return config.memory.remat or ("full" if config.model.remat else "none")


def check_classification(config: ConfigDict) -> None:
    """Raise ValueError naming the first field of a classification config that is unknown or out of range."""
    check_fields(config, CLASSIFICATION)
    args = config.task_args
    if "copied" in args and args.copied > args.length:
        raise ValueError(f"task_args.copied: got {args.copied}; expected at most length, {args.length}")
    if any(length <= args.length for length in args.get("longer", ())):
        raise ValueError(f"task_args.longer: got {args.longer}; expected lengths beyond {args.length}")
    if config.optimizer.rounding != "nearest":
        raise ValueError(f"optimizer.rounding: got {config.optimizer.rounding!r}; expected 'nearest' here")


def check_fields(
    config: ConfigDict | Mapping[str, Any], fields: Mapping[str, Field], *, required: bool = False
) -> None:
    """Raise ValueError naming the first value that its field does not allow, or that has no field."""
    given = flatten(config)
    for name, value in given.items():
        if name.startswith(_FREE):
            continue
        if name not in fields:
            raise ValueError(
                f"{name}: got {value!r}; expected no such field, see experiments/configs/checks.py"
            )
        if not fields[name].right(value):
            raise ValueError(f"{name}: got {value!r}; expected {fields[name].expected}")
    for name in fields if required else ():
        if name not in given:
            raise ValueError(f"{name}: got nothing; expected {fields[name].expected}")


def flatten(tree: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, each by its path with dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, ConfigDict | Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
