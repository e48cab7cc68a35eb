"""A sequence mixer read in both directions, for encoders: nothing is predicted from earlier tokens alone."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from .mixers.mixer import Mixer

SHARED = ("projections", "all", "none")


class Bidirectional(nn.Module):
    """mixer(x) + mixer(x from its last token to its first): x [B, T, D] -> y [B, T, D].

    Attributes:
      mixer: any `Mixer`, such as `Mamba()`.
      shared: the parameters that both directions have in common: the matrices of dense layers ("projections",
        nearly all of a mixer's), "all", or "none".

    Args of the call:
      x, segment_ids, lengths: as in `Mixer`; each document is read both ways by itself. There is no state: a
        token's output depends on those after it.

    Raises:
      ValueError: naming the argument that can't be right.

    Source: BiMamba, Schiff et al. 2024 (Caduceus, arXiv 2403.03234), which ties projections so.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> layer = frugax.layers.Bidirectional(frugax.layers.Mamba(state_size=4))
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, "kernel" in str(jax.tree.structure(variables["params"]["backward"]))
        ((1, 7, 16), False)
    """

    mixer: Mixer
    shared: str = "projections"

    @nn.compact
    def __call__(
        self, x: Array, *, segment_ids: Array | None = None, lengths: Array | None = None, **of_layer: Any
    ) -> Array:
        if self.shared not in SHARED:
            raise ValueError(f"shared: got {self.shared!r}; expected one of {', '.join(SHARED)}")
        how = {"segment_ids": segment_ids, "lengths": lengths} | of_layer
        forward = self.mixer.clone(parent=None, name=None)
        init = lambda key: forward.init(key, x, **how)["params"]  # noqa: E731
        ahead = self._given("forward", init)
        back = ahead
        if self.shared != "all":
            own = self._given("backward", lambda key: _without(self.shared, init(key)))
            back = _merged(ahead, own)
        y, _ = forward.apply({"params": ahead}, x, **how)
        z, _ = forward.apply({"params": back}, x, **how, reverse=True)
        return y + z

    def _given(self, name: str, init: Callable[[Array], Any]) -> Any:
        """The params of that name; the mixer checks their shapes, in which matrices may be packed."""
        if self.has_variable("params", name):
            return nn.meta.unbox(self.get_variable("params", name))
        return self.param(name, init)


def _without(shared: str, params: Any) -> Any:
    """The parameters of a direction's own."""
    flat = flatten_dict(params)
    return unflatten_dict({path: p for path, p in flat.items() if shared == "none" or path[-1] != "kernel"})


def _merged(params: Any, own: Any) -> Any:
    """The parameters with a direction's own in place of the other's."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(own))
