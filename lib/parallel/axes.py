"""Logical axes of params: the meaning of each dimension of a layer's arrays, found by its path."""

import re
from typing import Any

import jax

Axes = tuple[str | None, ...]

# The end of a path, and the axes of an array's last dimensions. The first that is found decides. None: short,
# or read by every part of the other axes. "embed" is the residual stream, "heads" and "mlp" are the inner
# channels of sequence and channel mixers.
TABLE: tuple[tuple[str, Axes], ...] = (
    (r"embedding|head", ("vocab", "embed")),
    (r"head/kernel", ("embed", "vocab")),
    (r"experts/(gate_in|in)/kernel", ("experts", "embed", "mlp")),
    (r"experts/out/kernel", ("experts", "mlp", "embed")),
    (r"router/kernel", ("embed", None)),
    (r"router/.*", (None,)),
    (r"channel/(shared/)?(gate_in|in|k)/kernel", ("embed", "mlp")),
    (r"channel/(shared/)?(out|v)/kernel", ("mlp", "embed")),
    (r"channel/r/kernel", ("embed", None)),
    # Sequence mixers: first what reads inner channels, then what reads the residual stream.
    (r"mixer/(.*/)?out/kernel", ("heads", "embed")),
    (r"mixer/dt_B_C/kernel", ("heads", None)),  # Mamba
    (r"mixer/dt/kernel", (None, "heads")),
    (r"mixer/A_log", ("heads", None)),
    (r"mixer/(conv/weight|forget/kernel)", (None, "heads")),
    (r"mixer/hidden/kernel", (None, "heads")),  # LMU: the input beside the memory
    (r"mixer/(decay_in|mix_in|signal)/kernel", ("embed", None)),  # low-rank, or a single channel
    (r"mixer/(decay_out|mix_out)", (None, "embed")),
    (r"mixer/(.*/)?\w+/kernel", ("embed", "heads")),
    (r"mixer/recurrent", ("heads", None, None)),
    (r"mixer/mu(_\w)?", (None,)),
    (r"(.*/)?(norm|\w+_norm)(/(weight|bias))?", (None,)),
    (r"mixer/(.*/)?(bias|weight|D|dt_bias|decay|bonus)", (None,)),
    (r"channel/(mu_\w|bias)", (None,)),
    (r"ForgetFloors/logits", (None, "embed")),
    (r"(.*/)?kernel", ("embed", "mlp")),
)
_TABLE = tuple((re.compile(rf"(?:.*/)?(?:{pattern})"), axes) for pattern, axes in TABLE)
_STACK = re.compile(r"(?:.*/)?layers/")  # scanned over depth
_PACKED = re.compile(r"/(codes|scales|zeros|choices|scales/codes)$")


def logical_axes(params: Any) -> Any:
    """Name the dimensions of params.

    Args:
      params: arrays or shapes, as this library's modules name them. Those of a scan over depth have the
        layers first. The arrays of a packed matrix have its axes.

    Returns:
      The same tree, with a tuple at each leaf: "layers", "vocab", "embed" (the residual stream), "heads" and
      "mlp" (inner channels of sequence and channel mixers), "experts", or None, for each dimension. All None
      where a path is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, frugax
        >>> model = frugax.layers.Decoder(vocab_size=10, width=16, repeats=3)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]
        >>> frugax.parallel.logical_axes(params)["layers"]["block_0"]["channel"]["out"]["kernel"]
        ('layers', 'mlp', 'embed')
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: axes_of(jax.tree_util.keystr(path, simple=True, separator="/"), x.ndim)[0], params
    )


def axes_of(path: str, ndim: int) -> tuple[Axes, bool]:
    """Name the dimensions of one array, and say if its path is known."""
    bare = _PACKED.sub("", path)
    stack: Axes = ("layers",) if _STACK.match(path) and ndim else ()
    for pattern, axes in _TABLE:
        if pattern.fullmatch(bare):
            rest = ndim - len(stack)
            axes = axes[-rest:] if rest else ()
            return (*stack, *(None,) * (rest - len(axes)), *axes), True
    return (*stack, *(None,) * (ndim - len(stack))), False
