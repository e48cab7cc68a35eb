"""`explain`: what would run for a call, on each platform, and why."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from .operation import Choice, recorded_choices


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Print, and return, which backend would serve `op(*args, **kwargs)` on each platform, and why.

    Args:
      op: an operation of `frugax.kernels`, or its name.
      *args, **kwargs: what the operation takes; `jax.ShapeDtypeStruct` stands for an array.

    Returns:
      The printed text: one line a platform, then one line for each kernel that can't serve the call.

    Raises:
      ValueError: `op` is no operation, or the call itself can't be right.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((1, 100, 2, 64), jnp.bfloat16)
        >>> text = frugax.kernels.explain("linear_attention", x, x, x)
        linear_attention
        ...
    """
    name = op if isinstance(op, str) else op.__name__
    function: Any = getattr(importlib.import_module("..", __package__), name, None)
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(x, jax.ShapeDtypeStruct | jax.Array | np.ndarray) for x in leaves]

    def call(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        merged = [next(rest) if array else x for array, x in zip(is_array, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, merged)
        return function(*args, **kwargs)

    choices: list[Choice] = []
    if callable(function):
        with recorded_choices() as choices:
            jax.eval_shape(call, [x for array, x in zip(is_array, leaves, strict=True) if array])
    if not choices:
        raise ValueError(f"op: got {name!r}; expected an operation of frugax.kernels, which runs on backends")
    text = "\n".join([name, *dict.fromkeys(line for choice in choices for line in _lines(name, choice))])
    print(text)
    return text


def _lines(name: str, choice: Choice) -> Iterator[str]:
    if choice.operation != name:
        yield f"  by {choice.operation}"
    yield from (f"  {platform}: {backend}" for platform, backend in choice.backends.items())
    yield from (f"  not {backend}: {reason}" for backend, reason in choice.reasons.items())
