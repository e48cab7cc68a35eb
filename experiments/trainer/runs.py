"""From a config to a model, and from a run's folder to what it trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import frugax
from experiments.configs.checks import remat_name
from experiments.configs.defaults import defaults
from experiments.data import Corpus, find_corpus
from experiments.trainer.checkpoints import Checkpoints
from experiments.trainer.parallel import Layout
from experiments.trainer.pipeline import make_pipeline
from experiments.trainer.state import make_train_step


def load_run(
    run_dir: str | Path, step: int | str | None = None
) -> tuple[ConfigDict, Any, dict[str, Any], str | None, int]:
    """Read the model that a run trained.

    Args:
      run_dir: what `experiments.train --run` was given.
      step: which checkpoint; None takes the newest, "best" the one with the fewest held-out bits per byte.

    Returns:
      config, module, variables ({"params": ...}; their average where the run kept one; and what else the
      model carries), the path of the tokenizer (None: bytes), and the step. The module is called as
      `module.apply(variables, tokens, state=None, segment_ids=None)`.

    Raises:
      CheckpointError: there is no checkpoint, or it can't be read.
    """
    checkpoints = Checkpoints(run_dir, read_only=True)
    step = checkpoints.find(step)
    config = defaults()  # of fields that are newer than the run
    config = ConfigDict(_merged(config.to_dict(), checkpoints.about(step)["config"]))
    module = build_model(config)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), dict(shapes))
    params = checkpoints.restore_params(step, like.pop("params"))
    variables = {"params": params} | checkpoints.restore_collections(step, like)
    return config, module, variables, config.data.tokenizer or None, step


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(v, over[k]) for k, v in base.items() if isinstance(v, dict) and k in over}
    return base | over | both


def step_named(text: str) -> int | str:
    """The step that a command line names: a number, or "best"; for argparse."""
    return text if text == "best" else int(text)


def corpus_of(config: ConfigDict) -> Corpus:
    """The text that `config.data` names.

    Raises:
      FileNotFoundError, ValueError: nothing is there, or no text; the field is named.
    """
    try:
        return find_corpus(config.data.path or None, heldout=config.data.held_out)
    except (FileNotFoundError, ValueError) as error:  # it names an argument of find_corpus
        argument, colon, told = str(error).partition(":")
        field = {"path": "data.path", "heldout": "data.held_out"}.get(argument, argument)
        told = told.replace("or heldout=0", "or data.held_out=0")
        raise type(error)(field + colon + told) from error


def build_model(config: ConfigDict) -> Any:
    """The language model that `config.model` describes.

    Returns:
      A Flax module, `module.apply(variables, tokens, state=None, segment_ids=None) -> (logits, state)`.

    Raises:
      ValueError: a field of `config.model` can't be right.
    """
    model = config.model
    unknown = [name for name in model.pattern if name not in model.blocks]
    if unknown or not model.pattern:
        there_are = ", ".join(model.blocks) or "there are none"
        raise ValueError(
            f"model.pattern: got {tuple(model.pattern)}; expected names of model.blocks ({there_are})"
        )
    decoder = frugax.layers.Decoder(
        vocab_size=model.vocab_size,
        width=model.width,
        blocks=tuple(_build_block(model, name) for name in model.pattern),
        repeats=model.repeats,
        tie_embeddings=model.tie_embeddings,
        ternary_head=model.ternary_head,
        remat=remat_name(config),
        offload=config.memory.offload,
        mlp_tiles=config.memory.mlp_tiles,
        unroll=model.unroll,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        backend=model.backend or None,
    )
    return _in_few_bits(decoder, model.low_bit) if model.low_bit else decoder


def _in_few_bits(decoder: Any, name: str) -> Any:
    try:
        recipe = frugax.quant.training.recipe_named(name)
    except ValueError as error:
        raise ValueError(f"model.low_bit: {error}") from error
    if recipe.history:
        raise ValueError(f"model.low_bit: got {name!r}; expected a recipe without a history of its own")
    return frugax.quant.training.LowBit(decoder, recipe)


def _build_block(model: ConfigDict, name: str) -> Any:
    try:
        return frugax.layers.Block(**model.blocks[name].to_dict())
    except TypeError as error:
        raise ValueError(f"model.blocks.{name}: {error}; expected fields of frugax.layers.Block") from error
    except ValueError as error:  # it begins with the name of a field
        raise ValueError(f"model.blocks.{name}.{error}") from error


def shapes_of(module: Any, config: ConfigDict) -> Any:
    """Shapes and dtypes of the params of `build_model(config)`.

    Raises:
      ValueError: a block can't be built from its arguments; it is named.
    """
    tokens = jnp.zeros((1, 2), jnp.int32)

    def trace(module):
        return jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]

    try:
        return trace(module)
    except Exception as error:  # layers refuse in words, but for a type or a zero that they did not think of
        decoder = module.module if config.model.low_bit else module
        for name, block in zip(config.model.pattern, decoder.blocks, strict=True):
            try:
                trace(decoder.clone(blocks=(block,), repeats=1, mlp_tiles=1))
            except Exception as its_error:
                raise ValueError(
                    f"model.blocks.{name}: {type(its_error).__name__}: {its_error}"
                ) from its_error
        raise ValueError(f"model: {type(error).__name__}: {error}") from error


def build_step(config: ConfigDict, module: Any, optimizer: Any, layout: Layout) -> Callable[..., Any]:
    """The function that takes one optimizer step as a config says, before it is compiled.

    Raises:
      ValueError: the config's pipeline can't be right.
    """
    return make_train_step(
        module,
        optimizer,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
        skip=config.skip_nonfinite > 0,
        rounding=config.optimizer.rounding,
        axis_name=layout.axis_name,
        place_grads=layout.place_grads,
        loss_tiles=config.memory.loss_tiles,
        pipeline=make_pipeline(config, module),
    )
