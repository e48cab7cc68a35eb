"""Checkpoints from elsewhere: Mamba, FalconMamba and Mamba-2, loaded into our `Decoder`."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from ...layers.block import Block
from ..decoder import Decoder
from .experts import load_experts as load_experts
from .files import EMBEDDING, HEAD, Tensor, open_tensors, read_config, setting
from .state_spaces import from_state_spaces


def load(folder: str | PathLike) -> tuple[Decoder, dict]:
    """The model in a folder of Hugging Face's, as a `Decoder` and its variables.

    Args:
      folder: holds config.json and either model.safetensors or the shards that model.safetensors.index.json
        lists. The config's model_type says what it is: "mamba", "falcon_mamba" or "mamba2"; a config in the
        words of the package mamba_ssm, with d_model and ssm_cfg, is read too. The tensors' names may lack
        "backbone." in front, as a base model's do.

    Returns:
      module: computes in float32; `module.clone(dtype=jnp.bfloat16)` in less. Its head is its own where the
        file has one that differs from the embedding, whatever the config says.
      variables: {"params": ...} in the dtypes of the file, for `module.apply(variables, tokens)`.

    Raises:
      ImportError: safetensors is not installed (`pip install "frugax[experiments]"` has it).
      ValueError: what the folder lacks; a model_type or a setting that is not supported; tensors that are
        missing, unexpected or of another shape than the config's, all of them listed.

    Source: Mamba (arXiv 2312.00752), FalconMamba (2410.05355) and Mamba-2 (2405.21060), with the tensor names
    of `transformers`.

    Example:
        >>> import frugax
        >>> frugax.layers.pretrained.load("no/such/folder")
        Traceback (most recent call last):
        ValueError: folder: got 'no/such/folder', without a config.json; expected a Hugging Face folder
    """
    folder = Path(folder)
    config = read_config(folder)
    if "model_type" not in config and {"d_model", "n_layer"} <= set(config):
        config = from_state_spaces(config)
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        names = ", ".join(map(repr, FAMILIES))
        raise ValueError(f"model_type: got {config.get('model_type')!r}; expected one of {names}")
    with ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        module = _decoder(config, family, _is_tied(config, family, tensors))
        shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
        flat = flatten_dict(shapes["params"], sep="/")
        arrays = _read(folder, tensors, flat, _sources(config, family, module))
    return module, {"params": unflatten_dict(arrays, sep="/")}


class Place(NamedTuple):
    """The place of a tensor, and how it is turned: "as is", "transposed", or "taps" ([E, 1, W] -> [W, E])."""

    path: str
    turn: str = "as is"


class Family(NamedTuple):
    """A model_type: its block, and where its tensors go."""

    block: Callable[[dict], Block]
    tied: bool  # whether the head is the embedding where the config does not say
    mixer: dict[str, Place]  # by the name behind "backbone.layers.<i>.mixer."


_CONV = {"conv1d.weight": Place("conv/weight", "taps"), "conv1d.bias": Place("conv/bias")}
_MAMBA = _CONV | {
    "in_proj.weight": Place("in_gate/kernel", "transposed"),
    "x_proj.weight": Place("dt_B_C/kernel", "transposed"),
    "dt_proj.weight": Place("dt/kernel", "transposed"),
    "dt_proj.bias": Place("dt_bias"),
    "A_log": Place("A_log"),
    "D": Place("D"),
    "out_proj.weight": Place("out/kernel", "transposed"),
}
_MAMBA2 = _CONV | {
    "in_proj.weight": Place("gate_in_dt/kernel", "transposed"),
    "dt_bias": Place("dt_bias"),
    "A_log": Place("A_log"),
    "D": Place("D"),
    "norm.weight": Place("norm"),
    "out_proj.weight": Place("out/kernel", "transposed"),
}


def _mamba_block(config: dict, inner_norm: float | None = None) -> Block:
    width, rank = setting(config, "hidden_size"), config.get("time_step_rank", "auto")
    inner = config.get("intermediate_size") or int(config.get("expand", 2) * width)
    args = {
        "expand": inner / width,
        "state_size": config.get("state_size", 16),
        "conv_width": config.get("conv_kernel", 4),
        "dt_rank": math.ceil(width / 16) if rank == "auto" else rank,
        "inner_norm": inner_norm,
    }
    return Block("Mamba", None, args, norm_args={"epsilon": config.get("layer_norm_epsilon", 1e-5)})


def _falcon_block(config: dict) -> Block:
    return _mamba_block(config, config.get("mixer_rms_eps", 1e-6))


def _mamba2_block(config: dict) -> Block:
    low, high = config.get("time_step_limit", (0.0, math.inf))
    width, heads, expand = (
        setting(config, "hidden_size"),
        setting(config, "num_heads"),
        config.get("expand", 2),
    )
    if heads * setting(config, "head_dim") != int(expand * width):
        size = f"expand * hidden_size / num_heads = {expand * width / heads:g}"
        raise ValueError(f"head_dim: got {config['head_dim']}; expected {size}")
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    args = {
        "heads": heads,
        "expand": expand,
        "state_size": config.get("state_size", 128),
        "groups": config.get("n_groups", 8),
        "conv_width": config.get("conv_kernel", 4),
        "norm_epsilon": epsilon,
        "norm_before_gate": config.get("norm_before_gate", False),
        "dt_limit": (low, math.inf if high == {"__float__": "Infinity"} else high),
    }
    return Block("Mamba2", None, args, norm_args={"epsilon": epsilon})


FAMILIES = {
    "mamba": Family(_mamba_block, True, _MAMBA),
    "falcon_mamba": Family(_falcon_block, True, _MAMBA),
    "mamba2": Family(_mamba2_block, False, _MAMBA2),
}


def _is_tied(config: dict, family: Family, tensors: dict[str, Tensor]) -> bool:
    """True where the head is the embedding: what the file holds decides where it holds both."""
    tied = config.get("tie_word_embeddings", family.tied)
    if HEAD not in tensors or EMBEDDING not in tensors:
        return tied
    return tied and np.array_equal(tensors[HEAD].read(), tensors[EMBEDDING].read())


def _decoder(config: dict, family: Family, tied: bool) -> Decoder:
    for name, known in {"hidden_act": ("silu", "swish"), "use_bias": (False,)}.items():
        if config.get(name, known[0]) not in known:
            raise ValueError(f"{name}: got {config[name]!r}; expected {' or '.join(map(repr, known))}")
    return Decoder(
        vocab_size=setting(config, "vocab_size"),
        width=setting(config, "hidden_size"),
        blocks=(family.block(config),),
        repeats=setting(config, "num_hidden_layers"),
        tie_embeddings=tied,
    )


class Source(NamedTuple):
    """The tensors that make one of our arrays: one, or one a layer to be stacked; and how to turn each."""

    names: tuple[str, ...]
    stacked: bool
    turn: str

    def shape_in_file(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        ours = ours[1:] if self.stacked else ours
        return {"as is": ours, "transposed": ours[::-1], "taps": (*ours[1:], 1, *ours[:1])}[self.turn]

    def array(self, read: Callable[[str], np.ndarray]) -> Array:
        parts = [read(name) for name in self.names]
        if self.turn != "as is":
            parts = [(part[:, 0] if self.turn == "taps" else part).T for part in parts]
        return jnp.asarray(np.stack(parts) if self.stacked else parts[0])


def _sources(config: dict, family: Family, module: Decoder) -> dict[str, Source]:
    """Path of each of our arrays -> what it is made of."""
    once = {"embedding": EMBEDDING, "norm/weight": "backbone.norm_f.weight"}
    if not module.tie_embeddings:
        once["head"] = HEAD
    sources = {path: Source((name,), False, "as is") for path, name in once.items()}
    in_layer = {"norm.weight": Place("mixer_norm/weight")}
    in_layer |= {f"mixer.{name}": Place(f"mixer/{path}", turn) for name, (path, turn) in family.mixer.items()}
    if not config.get("use_conv_bias", True):
        del in_layer["mixer.conv1d.bias"]
    for name, (path, turn) in in_layer.items():
        names = tuple(f"backbone.layers.{i}.{name}" for i in range(module.repeats))
        sources[f"layers/block_0/{path}"] = Source(names, True, turn)
    return sources


def _read(
    folder: Path, tensors: dict[str, Tensor], shapes: dict[str, Any], sources: dict[str, Source]
) -> dict[str, Array]:
    """Our arrays by their paths, once every tensor is known to be there in the right shape."""
    wanted = {
        name: list(source.shape_in_file(shapes[path].shape))
        for path, source in sources.items()
        for name in source.names
    }
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = [name for name in wanted if name in found and found[name] != wanted[name]]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": sorted(set(found) - set(wanted) - {HEAD}),  # a tied head may be there as well
        "misshaped": [f"{name} {found[name]} (expected {wanted[name]})" for name in wrong],
    }
    if any(problems.values()):
        lines = [f"\n  {what}: {', '.join(names)}" for what, names in problems.items() if names]
        raise ValueError(f"folder: {str(folder)!r} does not hold what its config.json says{''.join(lines)}")
    values = {path: source.array(lambda name: tensors[name].read()) for path, source in sources.items()}
    # What no tensor makes is the bias of convolutions that have none.
    return {path: values.get(path, jnp.zeros(leaf.shape, leaf.dtype)) for path, leaf in shapes.items()}
