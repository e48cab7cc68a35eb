"""From a config to a model, and from a run's folder to what it trained."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import frugax
from experiments.trainer.checkpoints import CheckpointError, Checkpoints


def load_run(
    run_dir: str | Path, step: int | None = None
) -> tuple[ConfigDict, Any, dict[str, Any], str | None, int]:
    """Read the model that a run trained.

    Args:
      run_dir: what `experiments.train --run` was given.
      step: which checkpoint; None takes the newest.

    Returns:
      config, module, variables ({"params": ...}; the moving average where the run kept one), the path of the
      tokenizer (None: bytes), and the step. `module.apply(variables, tokens, state=None, segment_ids=None)`.

    Raises:
      CheckpointError: there is no checkpoint, or it can't be read.
    """
    checkpoints = Checkpoints(run_dir, read_only=True)
    step = checkpoints.latest_step() if step is None else step
    if step is None:
        raise CheckpointError(f"{checkpoints.folder} holds no checkpoint yet")
    config = ConfigDict(checkpoints.about(step)["config"])
    module = build_model(config)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    params = checkpoints.restore_params(step, like, ema=bool(config.ema_decay))
    return config, module, {"params": params}, config.data.tokenizer or None, step


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
    return frugax.layers.Decoder(
        vocab_size=model.vocab_size,
        width=model.width,
        blocks=tuple(frugax.layers.Block(**model.blocks[name].to_dict()) for name in model.pattern),
        repeats=model.repeats,
        tie_embeddings=model.tie_embeddings,
        remat=model.remat,
        unroll=model.unroll,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        backend=model.backend or None,
    )
