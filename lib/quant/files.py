"""Packed trees in safetensors files."""

import json
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ..formats import QuantizedTensor, format_named, quantize

PACKED = "packed"  # the field of the file's metadata that tells of the arrays that are packed


def save_params(path: str | PathLike, params: Any) -> None:
    """Write a tree of params, packed or not, to one safetensors file.

    Args:
      path: of the file.
      params: nested dicts of arrays and `QuantizedTensor`s in formats that have names.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: a format has no name, so that `load_params` could not find it.

    Example:
        >>> import frugax, jax.numpy as jnp, tempfile
        >>> params = {"kernel": frugax.formats.quantize(jnp.ones((64, 8)), "int4"), "bias": jnp.ones(8)}
        >>> path = tempfile.mkdtemp() + "/params.safetensors"
        >>> frugax.quant.save_params(path, params)
        >>> frugax.quant.load_params(path)["kernel"].shape
        (64, 8)
    """
    save_file = _safetensors().save_file
    tensors, packed = {}, {}
    for name, leaf in flatten_dict(params, sep="/").items():
        if not isinstance(leaf, QuantizedTensor):
            tensors[name] = jnp.asarray(leaf)
            continue
        if leaf.format != _known(leaf.format.name):
            raise ValueError(
                f"params: {name} is in {leaf.format}; expected a format of frugax.formats by its name"
            )
        tensors |= {f"{name}/{part}": jnp.asarray(array) for part, array in _parts(leaf).items()}
        packed[name] = {"format": leaf.format.name, "shape": leaf.shape} | {
            field: getattr(leaf, field) for field in ("axis", "group_size")
        }
    save_file(tensors, path, metadata={PACKED: json.dumps(packed)})


def load_params(path: str | PathLike) -> dict[str, Any]:
    """Read what `save_params` wrote.

    Args:
      path: of the file; one of another writer gives its arrays as they are.

    Returns:
      The nested dicts of arrays and `QuantizedTensor`s.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: an array is missing, or of another shape than its format's.

    Example:
        >>> import frugax, jax.numpy as jnp, tempfile
        >>> path = tempfile.mkdtemp() + "/params.safetensors"
        >>> frugax.quant.save_params(path, {"layer": {"bias": jnp.ones(8)}})
        >>> frugax.quant.load_params(path)["layer"]["bias"].shape
        (8,)
    """
    tensors = _safetensors().load_file(path)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        about = json.loads((file.metadata() or {}).get(PACKED, "{}"))
    for name, how in about.items():
        like = _like(**how)
        parts = {part: tensors.pop(f"{name}/{part}", None) for part in _parts(like)}
        for part, wanted in _parts(like).items():
            got = parts[part]
            if got is None or got.shape != wanted.shape or got.dtype != wanted.dtype:
                found = "nothing" if got is None else f"{got.dtype}{list(got.shape)}"
                expected = f"{wanted.dtype}{list(wanted.shape)}, of {how}"
                raise ValueError(f"path: {str(path)!r} has {found} for {name}/{part}; expected {expected}")
        tensors[name] = jax.tree.unflatten(jax.tree.structure(like), list(parts.values()))
    return unflatten_dict(tensors, sep="/")


def _safetensors():
    try:
        import safetensors.flax
    except ImportError as error:
        raise ImportError("packed files need safetensors: pip install safetensors") from error
    return safetensors.flax


def _known(name: str) -> Any:
    try:
        return format_named(name)
    except ValueError:
        return None


def _parts(q: QuantizedTensor) -> dict[str, Any]:
    """The arrays of a tensor by their names in it, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(q)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _like(format: str, shape: list[int], axis: int, group_size: int) -> QuantizedTensor:
    """The shapes of a tensor in a format."""
    chosen = format_named(format)
    size = None if chosen.scheme == _known("ternary").scheme else group_size
    x = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return jax.eval_shape(lambda x: quantize(x, chosen, axis=axis, group_size=size), x)
