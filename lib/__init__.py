"""frugax: hardware-efficient primitives for sequence models in JAX.

Sub-packages load on first use, so `import frugax` costs little over `import jax` and starts no device.

Example:
    >>> import frugax, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 5, 2, 4))
    >>> out, state = frugax.kernels.linear_attention(q, k, v)
    >>> out.shape, state.shape
    ((1, 5, 2, 4), (1, 2, 4, 4))
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "compress",
    "formats",
    "kernels",
    "layers",
    "memory",
    "models",
    "moe",
    "optim",
    "parallel",
    "peft",
    "planner",
    "quant",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
