"""A checkpoint's config and the tensors of its files, by the names that `transformers` gives them."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HEAD, EMBEDDING, BACKBONE = "lm_head.weight", "backbone.embeddings.weight", "backbone."


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; ValueError where there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"folder: got {str(folder)!r}, without a config.json; expected a Hugging Face folder"
        )
    return json.loads((folder / "config.json").read_text())


def setting(config: dict[str, Any], *names: str) -> Any:
    """The first of these settings that the config has; ValueError where it has none."""
    for name in names:
        if name in config:
            return config[name]
    raise ValueError(f"config.json: has no {' or '.join(map(repr, names))}")


class Tensor(NamedTuple):
    """A tensor in an open file, by its name there."""

    file: Any
    name: str

    @property
    def shape(self) -> list[int]:
        return list(self.file.get_slice(self.name).get_shape())

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Tensor]:
    """The folder's tensors by their full names; the files are open until the stack is closed.

    A base model's names get "backbone." in front, and mamba_ssm's embedding its plural. Where only the head
    is stored, it is the embedding as well.

    Raises:
      ImportError, ValueError: as `load`.
    """
    tensors = open_files(folder, stack)
    if not any(name.startswith(BACKBONE) for name in tensors):
        tensors = {name if name == HEAD else BACKBONE + name: at for name, at in tensors.items()}
    singular = tensors.pop(BACKBONE + "embedding.weight", None)
    if singular is not None:
        tensors[EMBEDDING] = singular
    if HEAD in tensors:
        tensors.setdefault(EMBEDDING, tensors[HEAD])
    return tensors


def open_files(folder: Path, stack: ExitStack) -> dict[str, Tensor]:
    """The folder's tensors by their names in its files, which are open until the stack is closed.

    Raises:
      ImportError, ValueError: as `load`.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("loading a checkpoint needs safetensors: pip install safetensors") from error
    opened = [stack.enter_context(safe_open(folder / name, framework="numpy")) for name in _shards(folder)]
    return {name: Tensor(file, name) for file in opened for name in file.keys()}  # noqa: SIM118


def _shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    absent = [name for name in shards if not (folder / name).is_file()]
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if absent and pickled:
        raise ValueError(
            f"folder: {str(folder)!r} holds {pickled[0]}, which pickles code; expected {', '.join(absent)}. "
            "Write it with safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)"
        )
    if absent:
        raise ValueError(f"folder: {str(folder)!r} lacks {', '.join(absent)}")
    return shards
