"""`explain`: what would run for a call, on each platform, and why."""

import importlib
from collections.abc import Callable
from typing import Any


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
    try:
        room = importlib.import_module(f"..{name}", __package__)
        planned = room.plan
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(f"op: {name!r} is no operation of frugax.kernels") from None
    chosen, reasons = planned(*args, **kwargs)
    lines = [name, *(f"  {platform}: {backend}" for platform, backend in chosen.items())]
    lines += [f"  not {backend}: {reason}" for backend, reason in reasons.items() if reason is not None]
    text = "\n".join(lines)
    print(text)
    return text
