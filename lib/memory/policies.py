"""Policies of rematerialization by name: what a layer keeps for its backward pass, and where."""

from typing import Any, NamedTuple

import jax

# The name (`jax.ad_checkpoint.checkpoint_name`) that a decoder's layer gives to its input.
LAYER_INPUT = "layer_input"


class Policy(NamedTuple):
    """A way to keep activations for the backward pass.

    Attributes:
      keeps: the activations of a layer that stay; the others are computed again.
      saveable: what `jax.checkpoint` takes as `policy`; None: nothing but the layer's inputs.
    """

    keeps: str
    saveable: Any


POLICIES = {
    "none": Policy("everything that the backward pass reads: nothing is computed again", None),
    "dots": Policy(
        "its input, and the results of matrix products and convolutions",
        jax.checkpoint_policies.dots_saveable,
    ),
    "dots_without_batch": Policy(
        "its input, and the results of products with params: those of scores, or of chunks with states, "
        "have a batch axis",
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
    "full": Policy("its input alone", None),
}


def remat_policy(name: str, *, offload: bool = False) -> Any:
    """The policy called `name`, for `jax.checkpoint(f, policy=...)` and `flax.linen.remat`.

    Args:
      name: one of `POLICIES` but "none", which is no checkpoint at all: "full", "dots" or
        "dots_without_batch". `POLICIES[name].keeps` says what each keeps.
      offload: what is kept waits for the backward pass in the host's memory ("pinned_host"), for "full" and
        "dots_without_batch". The input of f goes there where f names it
        `checkpoint_name(x, frugax.memory.LAYER_INPUT)`, as layers of `Decoder` do. XLA's CPU compiler
        leaves everything where it is.

    Returns:
      A policy of `jax.checkpoint`; None for "full" without offload, which is that function's default.

    Raises:
      ValueError: an unknown name, or one that keeps what can't be offloaded.

    Source: Chen et al. 2016 (arXiv 1604.06174), for "full"; Arctic Long Sequence Training, Bekman et al. 2025
    (2506.13996), for its offload.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> f = jax.checkpoint(lambda x: jnp.sin(x @ x), policy=frugax.memory.remat_policy("dots"))
        >>> jax.grad(lambda x: f(x).sum())(jnp.eye(2)).shape
        (2, 2)
        >>> frugax.memory.POLICIES["full"].keeps
        'its input alone'
    """
    check_remat(name, offload)
    if name == "none":
        raise ValueError("name: got 'none', which is no checkpoint; expected 'dots', 'full', ...")
    if not offload:
        return POLICIES[name].saveable
    policies, there = jax.checkpoint_policies, {"offload_src": "device", "offload_dst": "pinned_host"}
    of_input = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT], **there
    )
    if name == "full":
        return of_input
    of_dots = policies.offload_dot_with_no_batch_dims(**there)

    def of_both(primitive, *args, **params):
        return (of_input if primitive.name == "name" else of_dots)(primitive, *args, **params)

    return of_both


def check_remat(name: str, offload: bool = False) -> None:
    """Raise ValueError unless there is such a policy, and what it keeps can be offloaded if it is to be."""
    if name not in POLICIES:
        raise ValueError(f"remat: got {name!r}; expected one of {', '.join(map(repr, POLICIES))}")
    if offload and name not in ("full", "dots_without_batch"):
        raise ValueError(f"offload: got True with remat={name!r}; expected 'full' or 'dots_without_batch'")
