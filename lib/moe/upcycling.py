"""The params of a layer of experts from those of one trained feed-forward layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Key


def upcycle(
    params: Any,
    experts: int,
    *,
    key: Key[Array, ""] | None = None,
    router_scale: float = 0.02,
    noise: float = 0.0,
    shared: bool = False,
    expert_scale: float = 1.0,
) -> dict[str, Any]:
    """Copy a dense feed-forward layer into every expert of a mixture.

    With weights of experts that sum to 1, the mixture computes what the dense layer did, whatever the router
    says, as long as there is no noise and nothing is dropped. With `shared` the dense layer stays as the
    shared expert beside the copies; `expert_scale=0` then keeps its outputs.

    Args:
      params: of a `frugax.layers.GLU` or `MLP`, {"gate_in" or "in": {"kernel"}, "out": {"kernel"}}. Layers
        that are stacked, as under a scan, go through `jax.vmap`.
      experts: E.
      key: of the router's weights and of the noise; None: the router is zero, and there is no noise.
      router_scale: the standard deviation of the router's weights.
      noise: the standard deviation of what is added to each copy of a matrix, in parts of the matrix's rms.
      shared: whether the dense layer is also the shared expert, in MoTE's form.
      expert_scale: what the copies' last matrix is multiplied by.

    Returns:
      The params of a `frugax.layers.MoE`: "router" [D, E] in float32, "experts" with a leading axis E, and
      "shared" where it is asked for.

    Raises:
      ValueError: params are of no such layer, experts is below 1, or there is noise without a key.

    Source: Komatsuzaki et al. 2022, Sparse upcycling (arXiv 2212.05055); Wang et al. 2025, MoTE (arXiv
    2506.14435).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> dense = frugax.layers.GLU(expand=2).init(jax.random.key(0), jnp.ones((1, 3, 8)))["params"]
        >>> params = frugax.moe.upcycle(dense, 4, key=jax.random.key(1))
        >>> params["router"]["kernel"].shape, params["experts"]["gate_in"]["kernel"].shape
        ((8, 4), (4, 8, 32))
    """
    entry = check_feed_forward(params)
    if experts < 1:
        raise ValueError(f"experts: got {experts}; expected at least 1")
    if noise and key is None:
        raise ValueError(f"key: got None with noise={noise}; expected a key")
    D = params[entry]["kernel"].shape[0]
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (experts, *x.shape)), params)
    router = jnp.zeros((D, experts), jnp.float32)
    if key is not None:
        of_router, of_noise = jax.random.split(key)
        router = router_scale * jax.random.normal(of_router, router.shape)
        if noise:
            for name, at in zip((entry, "out"), jax.random.split(of_noise), strict=True):
                kernel = copies[name]["kernel"]
                rms = jnp.sqrt(jnp.mean(kernel.astype(jnp.float32) ** 2))
                added = noise * rms * jax.random.normal(at, kernel.shape)
                copies[name] = copies[name] | {"kernel": (kernel + added).astype(kernel.dtype)}
    out = copies["out"]
    copies["out"] = out | {"kernel": out["kernel"] * jnp.asarray(expert_scale, out["kernel"].dtype)}
    made = {"router": {"kernel": router}, "experts": copies}
    return made | {"shared": params} if shared else made


def check_feed_forward(params: Any) -> str:
    """The name of the first matrix in the params of a GLU ("gate_in") or an MLP ("in").

    Raises:
      ValueError: params are of neither, or a kernel is no array [K, N].
    """
    names = sorted(params) if isinstance(params, dict) else type(params).__name__
    for entry in ("gate_in", "in"):
        if names == sorted((entry, "out")):
            for name in names:
                kernel = params[name].get("kernel")
                is_array = isinstance(kernel, Array | np.ndarray)
                if not is_array or kernel.ndim != 2:
                    got = list(kernel.shape) if is_array else type(kernel).__name__
                    raise ValueError(f"params: got {got} for {name}'s kernel; expected an array [K, N]")
            return entry
    raise ValueError(f"params: got {names}; expected those of a GLU (gate_in, out) or an MLP (in, out)")
