"""A sequence mixer read in both directions, for encoders: nothing is predicted from earlier tokens alone."""

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
        mixer = self.mixer.clone(parent=self, name="forward")
        y, _ = mixer(x, **how)
        if self.shared == "all":
            return y + mixer(x, **how, reverse=True)[0]
        if self.shared == "none":
            return y + self.mixer.clone(parent=self, name="backward")(x, **how, reverse=True)[0]
        own = self._given(x, how)

        # The same module as ahead, so that what sees its calls, as calibration does, finds matrices there.
        def back(mixer, x):
            return mixer(x, **how, reverse=True)

        ahead = _picked(mixer.variables["params"], own)
        turned = nn.map_variables(
            back,
            "params",
            lambda variables: {"params": _merged(variables["params"], own)},
            lambda variables: {"params": _merged(variables["params"], ahead)},
            mutable=self.is_mutable_collection("params"),
        )
        return y + turned(mixer, x)[0]

    def _given(self, x: Array, how: dict[str, Any]) -> Any:
        """The parameters of the way back that are its own."""
        if self.has_variable("params", "backward"):
            return nn.meta.unbox(self.get_variable("params", "backward"))
        init = self.mixer.clone(parent=None, name=None).init
        return self.param("backward", lambda key: _without_kernels(init(key, x, **how)["params"]))


def _without_kernels(params: Any) -> Any:
    """The parameters but for the matrices of dense layers."""
    return unflatten_dict({path: p for path, p in flatten_dict(params).items() if path[-1] != "kernel"})


def _picked(params: Any, like: Any) -> Any:
    """The parameters that `like` has too."""
    return unflatten_dict({path: p for path, p in flatten_dict(params).items() if path in flatten_dict(like)})


def _merged(params: Any, own: Any) -> Any:
    """The parameters with a direction's own in place of the other's."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(own))
