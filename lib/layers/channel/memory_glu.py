"""A gated linear unit with hidden units that each document brings along."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from .mlp import GLU, activation_fn


class MemoryGLU(GLU):
    """A `GLU` that also reads memories: the same as one with more hidden units, others for each document.

    The params are those of a `GLU`. The memories are the collection "memory", which `frugax.moe.fetch`
    gathers by each document's path in a tree of clusters: "gate_in" [B, D, 2 * M] and "out" [B, M, D], or
    with a batch of 1 for all. Without that collection the layer is a `GLU`: a trained model can be given
    memories later.

    Attributes: those of `GLU`; `ternary` has no memories.

    Raises:
      ValueError: memories have other shapes.

    Source: Pouransari et al. 2025 (arXiv 2510.02375), its feed-forward memories.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> layer, x = frugax.layers.MemoryGLU(), jnp.ones((2, 5, 16))
        >>> params = layer.init(jax.random.key(0), x)["params"]
        >>> memory = {"gate_in": jnp.ones((2, 16, 2 * 8)), "out": jnp.ones((2, 8, 16))}
        >>> layer.apply({"params": params, "memory": memory}, x).shape
        (2, 5, 16)
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        given = self.has_variable("memory", "gate_in") and not self.is_initializing()
        if given and self.ternary:
            raise ValueError("memory: got one for a ternary layer; expected ternary=False")
        y = super().__call__(x)
        if self.is_initializing():  # a place for `frugax.moe.memory_bank` to fill, without hidden units yet
            D = x.shape[-1]
            self.variable("memory", "gate_in", jnp.zeros, (1, D, 0), self.param_dtype)
            self.variable("memory", "out", jnp.zeros, (1, 0, D), self.param_dtype)
        elif given:
            y = y + self._read(x, *(self.get_variable("memory", name) for name in ("gate_in", "out")))
        return y

    def _read(self, x: Array, gate_in: Array, out: Array) -> Array:
        B, _, D = x.shape
        n, hidden = gate_in.shape[0], gate_in.shape[-1] // 2
        if n not in (1, B) or gate_in.shape != (n, D, 2 * hidden) or out.shape != (n, hidden, D):
            raise ValueError(
                f"memory: got gate_in {list(gate_in.shape)}, out {list(out.shape)}; "
                f"expected [{B} or 1, {D}, 2 * hidden] and [{B} or 1, hidden, {D}]"
            )
        dtype = self.dtype or x.dtype
        x, gate_in, out = (a.astype(dtype) for a in (x, gate_in, out))
        gate_in, out = (jnp.broadcast_to(a, (B, *a.shape[1:])) for a in (gate_in, out))
        gate, value = jnp.split(jnp.einsum("btd,bdh->bth", x, gate_in), 2, axis=-1)
        return jnp.einsum("bth,bhd->btd", activation_fn(self.activation)(gate) * value, out)
