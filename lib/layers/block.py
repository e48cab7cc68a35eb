"""A decoder's layer as data (`Block`), and as the module that the data describes (`BlockLayer`)."""

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from ..kernels.common.operation import Backend
from ..memory.policies import LAYER_INPUT
from ..memory.tiles import tiled_module
from ..parallel.activations import place_activations
from .mixers.mixer import Mixer

NORMS = ("RMSNorm", "SimpleRMSNorm", "LayerNorm")
CHANNELS = ("GLU", "MLP", "MoE", "RWKVChannel", "MemoryGLU")
ROUTER_READS = ("channel", "block", "previous")

# What the decoder says to every module; a block's arguments can't.
_FROM_DECODER = {"parent", "name", "dtype", "param_dtype", "backend", "out_scale"}


@dataclasses.dataclass(frozen=True)
class Block:
    """One layer of a decoder: x + mixer(norm(x)), then x + channel(norm(x)). Frozen and hashable.

    Attributes:
      mixer: the name of a sequence mixer in `frugax.layers`, or a subclass of `Mixer`.
      channel: the name of a channel mixer in `frugax.layers` ("GLU", "MLP", "MoE", "RWKVChannel"), a
        module class, or None. A subclass of `Mixer` has a state here too, such as the last token.
      mixer_args: the mixer's attributes that differ from its defaults, as a mapping or pairs.
      channel_args: likewise for the channel mixer.
      norm: "RMSNorm", "SimpleRMSNorm", "LayerNorm", or a module class.
      norm_args: likewise for the norms, such as {"epsilon": 1e-5}; the decoder's last norm has its last
        block's.
      router_reads: what a mixture of experts routes by. "channel": its own input. "block": the block's input,
        before the norm and the mixer, so that experts are known while the mixer runs (SmallThinker).
        "previous": the input of the mixture before it, in the decoder's order (pre-gated MoE); the first one
        reads its own. Those that are known early report the "chosen" experts in the collection "moe", and
        pre-gated ones the "announced" experts of the next.
      parallel: both mixers read one normed input, x + mixer(norm(x)) + channel(norm(x)): there is no
        "channel_norm", and under tensor parallelism one sum over devices can serve both.

    Raises:
      ValueError: a name or an argument that isn't there, with those that are.

    Source: SmallThinker (arXiv 2507.20984), as in llama.cpp; Hwang et al. 2023, pre-gated MoE (2308.12066);
    Jiang et al. 2024, MegaScale (2402.15627), for the parallel block of GPT-J and PaLM.

    Example:
        >>> import frugax
        >>> block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 2})
        >>> block.mixer_args
        (('heads', 2),)
    """

    mixer: str | type[Mixer] = "GatedLinearAttention"
    channel: str | type[nn.Module] | None = "GLU"
    mixer_args: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()
    channel_args: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()
    norm: str | type[nn.Module] = "RMSNorm"
    norm_args: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()
    router_reads: str = "channel"
    parallel: bool = False

    def __post_init__(self):
        # Sorted pairs of hashable values: equal blocks are equal, and jit can key on them.
        for field in ("mixer_args", "channel_args", "norm_args"):
            items = getattr(self, field)
            items = items.items() if hasattr(items, "items") else items
            object.__setattr__(self, field, tuple(sorted((k, _hashable(v)) for k, v in items)))
        _check_args("norm_args", self.norm_class, self.norm_args)
        _check_args("mixer_args", self.mixer_class, self.mixer_args)
        if self.channel is None and self.channel_args:
            raise ValueError(
                f"channel_args: got {dict(self.channel_args)} without a channel mixer; expected none"
            )
        if self.channel is not None:
            _check_args("channel_args", self.channel_class, self.channel_args)
        if self.router_reads not in ROUTER_READS:
            known = ", ".join(ROUTER_READS)
            raise ValueError(f"router_reads: got {self.router_reads!r}; expected one of {known}")
        if self.router_reads != "channel":
            self._check_router_reads()

    def _check_router_reads(self) -> None:
        reads = self.router_reads
        if self.channel is None or "router_input" not in getattr(self.channel_class, "takes", ()):
            raise ValueError(f"router_reads: got {reads!r} with channel={self.channel!r}; expected 'MoE'")
        router = dict(self.channel_args).get("router", "softmax_top_k")
        if reads == "previous" and router != "softmax_top_k":
            raise ValueError(
                f"router_reads: got 'previous' with router={router!r}; expected 'softmax_top_k', a function "
                "of logits alone"
            )

    @property
    def mixer_class(self) -> type[Mixer]:
        return _find("mixer", self.mixer, mixer_names(), Mixer)

    @property
    def channel_class(self) -> type[nn.Module]:
        return _find("channel", self.channel, CHANNELS, nn.Module)

    @property
    def channel_has_state(self) -> bool:
        """True where the channel mixer is called as sequence mixers are, with a state."""
        return self.channel is not None and _is_class(self.channel_class, Mixer)

    @property
    def norm_class(self) -> type[nn.Module]:
        return _find("norm", self.norm, NORMS, nn.Module)


def mixer_names() -> tuple[str, ...]:
    """The sequence mixers that `frugax.layers` has."""
    layers = vars(importlib.import_module(__package__))
    return tuple(name for name, x in layers.items() if _is_class(x, Mixer) and x is not Mixer)


def is_pointwise(channel: type[nn.Module]) -> bool:
    """Tell if a channel mixer treats each token by itself, and so can be applied to a part of them."""
    return getattr(channel, "pointwise", False)


def _is_class(x: Any, base: type) -> bool:
    return isinstance(x, type) and issubclass(x, base)


def _find(field: str, name: str | type, names: tuple[str, ...], base: type) -> type:
    if isinstance(name, type) and _is_class(name, base):
        return name
    if name not in names:
        raise ValueError(
            f"{field}: got {name!r}; expected one of {', '.join(names)}, or a {base.__name__} class"
        )
    return getattr(importlib.import_module(__package__), name)


def _check_args(field: str, module: type[nn.Module], args: tuple[tuple[str, Any], ...]) -> None:
    known = [f.name for f in dataclasses.fields(module) if f.name not in _FROM_DECODER]
    for name, _ in args:
        if name not in known:
            raise ValueError(f"{field}: {module.__name__} takes no {name!r}; expected {', '.join(known)}")


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
    return tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value


class BlockState(NamedTuple):
    """The state of a layer that mixes channels with a state too; others have their mixer's alone."""

    mixer: Any
    channel: Any


class Announced(NamedTuple):
    """Logits of the next mixture of experts, by the input of the last one, and whether there was one."""

    there: Array
    logits: Array  # [B, T, E]


class BlockLayer(nn.Module):
    """The module of one `Block`; `Decoder` makes and calls it.

    Args of the call:
      x, state: [B, T, D], and the state of the last call.
      over_depth: what differs by layer, of the mixer and of the channel mixer.
      rows: documents and lengths.
      new_document: rows that start a document with this call [B].
      shared: what all layers share: "token_ids" [B, T], and the "first_gate" [D, E] of pre-gated MoE.
      announced: what the layers before say to pre-gated ones.

    Returns:
      x, the state, and what it announces.
    """

    block: Block
    depth: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    backend: Backend | None
    segment_states: int | None = None
    mlp_tiles: int = 1

    @nn.compact
    def __call__(
        self,
        x: Array,
        state: Any,
        over_depth: tuple[dict[str, Array], dict[str, Array]],
        rows: dict[str, Any],
        new_document: Array | None,
        shared: dict[str, Any] | None = None,
        announced: Announced | None = None,
    ) -> tuple[Array, Any, Announced | None]:
        x = checkpoint_name(x, LAYER_INPUT)  # what a policy can offload
        shared, entering = shared or {}, x
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        out_scale = (2 * self.depth) ** -0.5  # two additions to the residual stream a layer
        if new_document is not None:
            state = jax.tree.map(lambda leaf: _zero_rows(leaf, new_document), state)

        how: dict[str, Any] = dict(rows)
        if self.segment_states is not None:
            how["segment_states"] = self.segment_states
        of_mixer, of_channel = over_depth
        has_two = self.block.channel_has_state
        channel_state = None
        if has_two and state is not None:
            state, channel_state = state

        mixer = self.block.mixer_class(
            **dict(self.block.mixer_args), **dtypes, backend=self.backend, out_scale=out_scale, name="mixer"
        )
        normed = self._norm("mixer_norm", dtypes)(x)
        mixed, state = mixer(normed, state=state, **how, **of_mixer)
        parallel = self.block.parallel and self.block.channel is not None
        if not parallel:
            x = place_activations(x + mixed)
        if self.block.channel is not None:
            args = dict(self.block.channel_args) | dtypes | {"out_scale": out_scale, "name": "channel"}
            if hasattr(self.block.channel_class, "backend"):
                args["backend"] = self.backend
            if not self.block.parallel:
                normed = self._norm("channel_norm", dtypes)(x)
            if has_two:
                channel = self.block.channel_class(**args)
                y, channel_state = channel(normed, state=channel_state, **how, **of_channel)
                state = BlockState(state, channel_state)
            else:
                takes = getattr(self.block.channel_class, "takes", ())
                given = {k: v for k, v in (rows | shared).items() if k in takes}
                if self.block.router_reads == "block":
                    given["router_input"] = entering
                if self.block.router_reads == "previous":
                    routed, announced = _pre_gated(normed, announced, shared["first_gate"], **of_channel)
                    given |= routed
                channel = self.block.channel_class(**args)
                if is_pointwise(self.block.channel_class) and self.mlp_tiles > 1:
                    y = tiled_module(channel, normed, tiles=self.mlp_tiles)
                else:
                    y = channel(normed, **given)
            # Their own sum first: over devices the compiler then adds partial sums, and sends one.
            x = place_activations(x + (mixed + y if parallel else y))
        return x, state, announced

    def _norm(self, name: str, dtypes: dict[str, Any]) -> nn.Module:
        return self.block.norm_class(**dict(self.block.norm_args), **dtypes, name=name)


def _pre_gated(
    x: Array, before: Announced | None, first_gate: Array, next_gate: Array
) -> tuple[dict[str, Array], Announced]:
    """Logits of a mixture, which the last one announced or are its own; and those of the next."""
    assert before is not None
    wide = x.astype(first_gate.dtype)
    own, ahead = (jnp.dot(wide, gate, precision="highest") for gate in (first_gate, next_gate))
    logits = jnp.where(before.there, before.logits, own)
    return {"logits": logits, "next_logits": ahead}, Announced(jnp.ones((), bool), ahead)


def _zero_rows(leaf: Array, rows: Array) -> Array:
    return jnp.where(rows.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.zeros_like(leaf), leaf)
