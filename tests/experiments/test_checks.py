"""Every number of a config that is set to zero, -1 or nothing has a meaning, or an error that names it."""

import importlib
import numbers
import re
import warnings

import jax
import pytest
from absl.testing import flagsaver
from ml_collections import ConfigDict

from experiments.configs.checks import CLASSIFICATION, TRAINING, check_classification, check_config, flatten
from experiments.trainer.flags import parse
from experiments.trainer.optimizers import check_optimizer, make_optimizer
from experiments.trainer.runs import build_model, shapes_of
from experiments.trainer.state import init_state, make_train_step
from tests.experiments import tiny
from tests.experiments.runs import ROOT

CONFIGS = {
    f"{path.parent.name}/{path.stem}": importlib.import_module(
        f"experiments.configs.{path.parent.name}.{path.stem}"
    ).get_config
    for path in sorted((ROOT / "experiments/configs").glob("*/*.py"))
}
# The values of 0, -1 and None that mean something; defaults.py says what.
MEANT = {
    "seed": (0,),
    "ema_decay": (0,),
    "skip_nonfinite": (0,),
    "log_every": (0,),
    "mesh.slice": (-1,),
    "mesh.data": (-1,),
    "mesh.fsdp": (-1,),
    "mesh.sequence": (-1,),
    "mesh.expert": (-1,),
    "mesh.tensor": (-1,),
    "mesh.zero": (0,),
    "distributed.processes": (0,),
    "distributed.process": (0, -1),
    "data.held_out": (0,),
    "model.vocab_size": (0,),
    "optimizer.warmup_steps": (0,),
    "optimizer.final_fraction": (0,),
    "optimizer.weight_decay": (0,),
    "optimizer.clip_norm": (0,),
    "checkpoint.every": (0,),
    "evaluation.every": (0,),
    "evaluation.max_bytes": (0,),
    "sample.tokens": (0,),
    "sample.temperature": (0,),
    "task_args.seed": (0,),
}


def numeric(config) -> list[str]:
    return [
        name
        for name, value in flatten(config).items()
        if isinstance(value, numbers.Real) and not isinstance(value, bool)
    ]


def changed(get_config, name, value) -> ConfigDict:
    config = get_config()
    with config.ignore_type(), config.unlocked():
        *path, last = name.split(".")
        node = config
        for key in path:
            node = node[key]
        node[last] = value
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_of_a_config(name):
    check = check_classification if name.startswith("classify") else check_config
    get_config = CONFIGS[name]
    check(get_config())
    fields = [field for field in numeric(get_config()) if field in TRAINING | CLASSIFICATION]
    assert len(fields) >= 8
    for field in fields:
        for value in (0, -1, None):
            config = changed(get_config, field, value)
            if value in MEANT.get(field, ()):
                check(config)
            else:
                shown = flatten(config)[field]  # a field of floats keeps 0 as 0.0
                with pytest.raises(ValueError, match=f"^{re.escape(field)}: got {shown}; expected "):
                    check(config)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("data.held_out", 1.0, "data.held_out: got 1.0; expected a finite number of at least 0 and below 1"),
        ("sample.temperature", float("nan"), "sample.temperature: got nan"),
        ("steps", 1.5, "steps: got 1.5; expected an integer of at least 1"),
        ("tensorboard", 1, "tensorboard: got 1; expected True or False"),
        ("model.dtype", "int8", "model.dtype: got 'int8'; expected 'float32'"),
        ("model.pattern", (), "model.pattern: got ()"),
        ("optimizer.decay", "(", "optimizer.decay: got '('; expected a regular expression"),
        ("optimizer.rounding", "down", "optimizer.rounding: got 'down'; expected 'nearest' or 'stochastic'"),
        ("optimizer.warmup_steps", 12, "optimizer.warmup_steps: got 12; expected 0 to 11 for 12 steps"),
        ("accumulate", 3, "batch_size: got 2; expected a multiple of 3"),
        ("memory.remat", "some", "memory.remat: got 'some'; expected '' or 'none' or 'dots'"),
        ("memory.offload", True, "memory.offload: got True with 'none'; expected memory.remat 'full' or"),
    ],
)
def test_other_values(field, value, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_config(changed(tiny.get_config, field, value))
    config = tiny.get_config()
    with config.unlocked():
        config.stesp = 3
    with pytest.raises(ValueError, match="stesp: got 3; expected no such field"):
        check_config(config)
    without = tiny.get_config()
    with without.unlocked():
        del without.steps
    with pytest.raises(ValueError, match="steps: got nothing"):
        check_config(without)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("classify")])
def test_every_number_of_blocks_and_options(name):
    """A block that can't be built is named, as is an optimizer; what can be built is a step of one shape."""

    def built(config):
        config.model.vocab_size = 8
        module, optimizer = build_model(config), make_optimizer(config.optimizer, config.steps)
        check_optimizer(config.optimizer, optimizer, shapes_of(module, config))
        state = jax.eval_shape(lambda: init_state(module, optimizer, 0, 0.0))
        batch = {
            name: jax.ShapeDtypeStruct((1, 4), dtype)
            for name, dtype in dict(
                tokens="int32", targets="int32", segment_ids="int32", weights="float32"
            ).items()
        } | {"bytes": jax.ShapeDtypeStruct((1,), "int32")}
        new, _ = jax.eval_shape(make_train_step(module, optimizer, accumulate=1, ema_decay=0.0), state, batch)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )

    built(CONFIGS[name]("adamw,smoke" if "llama" in name else "smoke"))
    passed, refused = [], []
    get_config = lambda: CONFIGS[name]("galore,smoke" if "llama" in name else "smoke")  # noqa: E731
    for field in numeric(get_config()):
        if not field.startswith(("model.blocks.", "optimizer.options.")):
            continue
        for value in (0, -1, None):
            try:
                built(changed(get_config, field, value))
                passed.append((field, value))
            except ValueError as error:
                refused.append(str(error))
    assert all(re.match(r"model\.blocks\.|optimizer", error) for error in refused)
    assert {(field.split(".")[-1], value) for field, value in passed} <= {
        ("adam_learning_rate", 0),  # what is no matrix stays
        ("conv_width", None),  # no convolution
    }


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("model.widht", r"got 'widht'; .* \(is it width\?\)"),
        ("zzz", "got 'zzz'; expected a field of the config$"),
    ],
)
def test_a_field_that_the_config_lacks_is_named(field, said):
    file = "--config=experiments/configs/lm/quickstart.py:smoke"
    with flagsaver.flagsaver(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ml_collections loads configs in a way that Python deprecates
        with pytest.raises(SystemExit, match=said):
            parse(["train", file, f"--config.{field}=3"])
