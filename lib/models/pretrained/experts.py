"""The layers of experts of Mixtral and Qwen3-MoE, from the files of Hugging Face."""

from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...layers.channel.moe import MoE
from .files import Tensor, open_files, read_config, setting


class Names(NamedTuple):
    """The names that a model_type gives to the parts of a layer of experts, in its config and its files."""

    experts: tuple[str, ...]  # the settings with the number of experts, the first that is there
    width: str  # the setting with the hidden width of one expert
    folder: str  # of the layer's tensors
    gate: str
    value: str
    out: str


FAMILIES = {
    "mixtral": Names(("num_local_experts",), "intermediate_size", "block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": Names(
        ("num_experts", "num_local_experts"),
        "moe_intermediate_size",
        "mlp",
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
}


def load_experts(folder: str | PathLike, layer: int) -> tuple[MoE, dict[str, Any]]:
    """Read one layer of experts of a model in a folder of Hugging Face's.

    Args:
      folder: as in `load`; the config's model_type is "mixtral" or "qwen3_moe".
      layer: which of the model's layers, from 0. Nothing else of the files is read.

    Returns:
      module: `frugax.layers.MoE`, which computes in float32; `module.clone(dtype=jnp.bfloat16)` in less. It
        drops no token.
      variables: {"params": ...} in the dtypes of the file, the router in float32. Where the width of an
        expert is no multiple of 8, neurons that are zero make it one.

    Raises:
      ImportError: safetensors is not installed (`pip install "frugax[experiments]"` has it).
      ValueError: what the folder lacks, a model_type or a setting that is not supported, or the layer's
        tensors that are missing or misshaped, all of them listed.

    Source: Jiang et al. 2024, Mixtral (arXiv 2401.04088) and Qwen3 (2505.09388), with the tensor names of
    `transformers`.

    Example:
        >>> import frugax
        >>> frugax.layers.pretrained.load_experts("no/such/folder", 0)
        Traceback (most recent call last):
        ValueError: folder: got 'no/such/folder', without a config.json; expected a Hugging Face folder
    """
    folder = Path(folder)
    config = read_config(folder)
    names = FAMILIES.get(config.get("model_type"))
    if names is None:
        known = ", ".join(map(repr, FAMILIES))
        raise ValueError(f"model_type: got {config.get('model_type')!r}; expected one of {known}")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act: got {config['hidden_act']!r}; expected 'silu'")
    experts = setting(config, *names.experts)
    D, H, k = (
        setting(config, "hidden_size"),
        setting(config, names.width),
        setting(config, "num_experts_per_tok"),
    )
    padded = -8 * (-H // 8)
    module = MoE(
        experts=experts,
        k=k,
        router_args={"normalize": config["model_type"] == "mixtral" or config.get("norm_topk_prob", False)},
        expand=padded / D,
        dtype=np.float32,
    )
    with ExitStack() as stack:
        tensors = _of_layer(open_files(folder, stack), layer, names)
        shapes = {"gate.weight": [experts, D]}
        for e in range(experts):
            shapes |= {f"experts.{e}.{name}.weight": [H, D] for name in (names.gate, names.value)}
            shapes[f"experts.{e}.{names.out}.weight"] = [D, H]
        missing = [name for name in shapes if name not in tensors]
        wrong = [
            f"{n} {tensors[n].shape} (expected {s})"
            for n, s in shapes.items()
            if n in tensors and tensors[n].shape != s
        ]
        if missing or wrong:
            listed = "; ".join(
                f"{what}: {', '.join(of)}" for what, of in (("missing", missing), ("misshaped", wrong)) if of
            )
            raise ValueError(
                f"layer: {layer} of {str(folder)!r} has no such experts as its config.json says; {listed}"
            )

        def stacked(name: str) -> np.ndarray:
            """[E, in, out], with zeros up to the padded width."""
            matrices = np.stack([tensors[f"experts.{e}.{name}.weight"].read().T for e in range(experts)])
            free = (0, padded - H)
            return np.pad(matrices, [(0, 0), free, (0, 0)] if name == names.out else [(0, 0), (0, 0), free])

        gate_in = np.concatenate([stacked(names.gate), stacked(names.value)], -1)
        params = {
            "router": {"kernel": tensors["gate.weight"].read().T.astype(np.float32)},
            "experts": {"gate_in": {"kernel": gate_in}, "out": {"kernel": stacked(names.out)}},
        }
    return module, {"params": params}


def _of_layer(tensors: dict[str, Tensor], layer: int, names: Names) -> dict[str, Tensor]:
    """The layer's tensors by their names in it; a base model's lack "model." in front."""
    inside = f"layers.{layer}.{names.folder}."
    prefixes = (f"model.{inside}", inside)
    return {n.removeprefix(p): t for n, t in tensors.items() for p in prefixes if n.startswith(p)}
