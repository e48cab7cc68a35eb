"""A causal language model assembled from data: a tuple of blocks, repeated, scanned over depth."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import LazyRng
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ..kernels.common.arguments import accumulator
from ..kernels.common.operation import Backend, check_backend
from ..kernels.common.rows import Rows, outputs_at, rows
from ..layers.block import Announced, Block, BlockLayer, is_pointwise
from ..layers.modules.bit_linear import BitLinear
from ..layers.modules.inputs import check_segment_ids
from ..layers.modules.packed import matrix_param, take_rows, times_transposed
from ..layers.modules.stacked import STACKED
from ..memory.policies import check_remat, remat_policy
from ..parallel.activations import place_activations

# Small, so that a tied head starts near uniform: with unit rows it would repeat the token.
_TABLE_INIT = nn.initializers.normal(0.02)


class DecoderState(NamedTuple):
    """The state that a decoder carries from call to call.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> model = frugax.layers.Decoder(vocab_size=5, width=8, blocks=(frugax.layers.Block("MLGRU"),))
        >>> (_, state), _ = model.init_with_output(jax.random.key(0), jnp.array([[1, 2]]))
        >>> isinstance(state, frugax.layers.DecoderState), state.last_segment
        (True, None)
    """

    layers: tuple[Any, ...]  # for each block the state of its mixer, every leaf [repeats, B, ...]
    last_segment: Array | None  # [B]: the document of the last token; None where no call had segment_ids

    def unpacked(self) -> "DecoderState":
        """The state with a row for each document: of a call with `segment_states=N`, B * N rows."""
        layers = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), self.layers)
        return DecoderState(layers, None if self.last_segment is None else self.last_segment.reshape(-1))


class Decoder(nn.Module):
    """Embedding, `len(blocks) * repeats` pre-norm layers, a final norm, and logits over the vocabulary.

    The layers run in the order of `blocks`, `repeats` times over, under one scan: compile time follows
    `len(blocks)`, not the depth, and params of layer (r, i) are `params["layers"]["block_<i>"]` at index r.

    Attributes:
      vocab_size: number of token ids.
      width: size of the residual stream.
      blocks: the layers of one repeat.
      repeats: how often they repeat, each time with parameters of their own.
      tie_embeddings: read logits off the embedding instead of a head of its own.
      ternary_head: a head of its own that is a `BitLinear`; not together with `tie_embeddings`.
      remat: the name of a policy of `frugax.memory.POLICIES` that says what a layer keeps for its backward
        pass, where it computes the rest again. True: "full". False: "none".
      offload: what the policy keeps waits in the host's memory (`frugax.memory.remat_policy`).
      mlp_tiles: apply GLU and MLP to this many tiles of time, one after the other, and again in the backward
        pass (`frugax.memory.tiled_module`); other channel mixers see all of time.
      unroll: write the repeats out instead of looping over them. Compile time then follows the depth; but XLA
        on CPU puts elementwise work on several cores only outside loops.
      dtype: what layers compute in, and the residual stream's dtype. Norms, states and logits are float32.
      param_dtype: what parameters are kept in.
      backend: handed to `frugax.kernels`; None picks by platform.

    Args of the call:
      tokens: ids [B, T] in [0, vocab_size). Others can't be seen at trace time: their embedding is NaN, and
        so are their row's logits from there on, at least.
      state: what the last call returned, to go on from there; None starts afresh.
      segment_ids: the document of each token [B, T], to pack several in a row: nothing passes from one to the
        next. A first token whose id is the last call's last goes on with that document; another id starts
        afresh. A call without ids goes on.
      lengths: how many tokens of each row are real [B], for prompts padded at their ends. The others are not
        read, and their logits are zeros; the state is that of each row's last real token.
      segment_states: return the states after each of a row's first N documents, N behind the batch of every
        leaf; `state.unpacked()` makes rows of them, to go on with each. Zeros for documents that a row lacks.
      hidden: return what the head reads [B, T, width] in place of logits. `head`, a method, makes logits of
        any part of it: `model.apply(variables, x, method="head")`. Not for `init`.

    Returns:
      logits [B, T, vocab_size] in float32, and the state.

    Raises:
      ValueError: naming the argument that can't be right.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 2})
        >>> model = frugax.layers.Decoder(vocab_size=10, width=16, blocks=(block,), repeats=3)
        >>> tokens = jnp.array([[1, 2, 3]])
        >>> variables = model.init(jax.random.key(0), tokens)
        >>> logits, state = model.apply(variables, tokens)
        >>> logits, state = model.apply(variables, logits[:, -1:].argmax(-1), state)  # the fourth token
        >>> logits.shape
        (1, 1, 10)
    """

    vocab_size: int = 256
    width: int = 192
    blocks: tuple[Block, ...] = dataclasses.field(default_factory=lambda: (Block(),))
    repeats: int = 1
    tie_embeddings: bool = True
    ternary_head: bool = False
    remat: bool | str = False
    offload: bool = False
    mlp_tiles: int = 1
    unroll: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    backend: Backend | None = None

    @nn.compact
    def __call__(
        self,
        tokens: ArrayLike,
        state: DecoderState | None = None,
        segment_ids: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        segment_states: int | None = None,
        hidden: bool = False,
    ) -> tuple[Array, DecoderState]:
        tokens = jnp.asarray(tokens)
        segment_ids, lengths = (None if x is None else jnp.asarray(x) for x in (segment_ids, lengths))
        self._check(tokens, state, segment_ids)
        read = rows(tokens.shape, segment_ids, lengths, segment_states)
        if read is not None:
            tokens, segment_ids = read.read(tokens), read.ids
        last_segment = None if state is None else state.last_segment
        new_document, last_segment = _documents(last_segment, segment_ids, read)

        table = (self.vocab_size, self.width)
        embedding = matrix_param(self, "embedding", _TABLE_INIT, table, self.param_dtype)
        x = self.rows_of(embedding, tokens)
        over_depth = self.over_depth(lambda kind: kind(param_dtype=self.param_dtype, name=kind.__name__))
        gates = self._gates() if self._pre_gated else None
        over_depth, shared, announced = self.beside_layers(over_depth, gates, tokens)
        layers = self._scanned(segment_states, name="layers")
        before = (None,) * len(self.blocks) if state is None else state.layers
        given: dict[str, Any] = {"segment_ids": segment_ids}
        given |= {} if lengths is None else {"lengths": lengths}
        (x, _), after = layers((x, announced), before, over_depth, given, new_document, shared)

        x = self.last_norm(name="norm")(x)
        if self.ternary_head:
            logits = x if hidden else self._ternary_head(name="head")(x)
        else:
            head = embedding
            if not self.tie_embeddings:
                head = matrix_param(self, "head", _TABLE_INIT, table, self.param_dtype)
            logits = x if hidden else times_transposed(x, head, backend=self.backend)
        return (logits if read is None else read.write(logits)), DecoderState(after, last_segment)

    def head(self, x: Array) -> Array:
        """The logits [..., vocab_size] of hidden values [..., width], those of a call with `hidden`."""
        params = self.variables["params"]
        if self.ternary_head:
            logits: Any = self._ternary_head(parent=None).apply({"params": params["head"]}, x)
            return logits
        table = params["embedding" if self.tie_embeddings else "head"]
        return times_transposed(x, nn.meta.unbox(table), backend=self.backend)

    def _ternary_head(self, **module: Any) -> BitLinear:
        return BitLinear(
            self.vocab_size,
            dtype=accumulator(jnp.dtype(self.dtype)),
            param_dtype=self.param_dtype,
            kernel_init=_TABLE_INIT,
            backend=self.backend,
            **module,
        )

    @property
    def _remat(self) -> str:
        """The name of the policy."""
        return self.remat if isinstance(self.remat, str) else "full" if self.remat else "none"

    # Parts of a call that `decoder_stages` puts together anew. They hold no params of their own.

    def rows_of(self, embedding: Any, tokens: Array) -> Array:
        """The embeddings [B, T, width] of tokens."""
        known = jnp.where(tokens < 0, self.vocab_size, tokens)  # -1 is no id, not the last one
        return place_activations(take_rows(embedding, known, self.dtype))

    def repeat(self, **module: Any) -> nn.Module:
        """The module of one repeat of the blocks, whose variables are slices of those of "layers"."""
        return _Layers(*self._of_repeat(None), **module)

    def repeat_rngs(self, rngs: Mapping[str, Array]) -> dict[str, LazyRng]:
        """The keys [repeats] that each repeat draws with, where `apply` is given these `rngs`."""
        split = {name: key for name, key in rngs.items() if STACKED["split_rngs"].get(name)}
        return {
            name: LazyRng.create(jax.random.split(key, self.repeats), "layers") for name, key in split.items()
        }

    def _scanned(self, segment_states: int | None, **module: Any) -> nn.Module:
        scan = nn.scan(
            _Layers,
            **STACKED,
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.repeats,
            unroll=self.repeats if self.unroll else 1,
            check_constancy_invariants=False,  # a second trace of the layers, to find nothing
        )
        return scan(*self._of_repeat(segment_states), **module)

    def _of_repeat(self, segment_states: int | None) -> tuple[Any, ...]:
        memory = (self._remat, self.offload, self.mlp_tiles)
        how = (self.dtype, self.param_dtype, self.backend, segment_states)
        return (self.blocks, len(self.blocks) * self.repeats, *memory, *how)

    def last_norm(self, **module: Any) -> nn.Module:
        """The norm before the head."""
        last = self.blocks[-1]
        return last.norm_class(
            **dict(last.norm_args), dtype=self.dtype, param_dtype=self.param_dtype, **module
        )

    def over_depth(self, make: Callable[[Any], Any]) -> tuple[tuple[dict[str, Array], dict[str, Array]], ...]:
        """For each block, the arguments of its two mixers that differ by layer, each [repeats, ...].

        Args:
          make: a kind of such arguments -> what gives them, called with the depth and the width.
        """
        n = len(self.blocks)
        kinds = [
            (block.mixer_class.over_depth, getattr(block.channel_class, "over_depth", None))
            if block.channel is not None
            else (block.mixer_class.over_depth, None)
            for block in self.blocks
        ]
        # Blocks of one kind share them: they are about the whole depth.
        given: dict[Any, dict[str, Array]] = {None: {}} | {
            kind: make(kind)(n * self.repeats, self.width)
            for kind in dict.fromkeys(kind for pair in kinds for kind in pair)
            if kind is not None
        }
        mine = [(given[mixer], given[channel]) for mixer, channel in kinds]
        return tuple(jax.tree.map(lambda a, i=i: a[i::n], args) for i, args in enumerate(mine))

    def beside_layers(
        self, over_depth: tuple[Any, ...], gates: Array | None, tokens: Array
    ) -> tuple[tuple[Any, ...], dict[str, Any], Announced | None]:
        """Return the arguments of layers beside the residual stream: those that differ by layer, those that
        they share, and the announcement of pre-gated mixtures to the first."""
        channels = [block.channel_class for block in self.blocks if block.channel is not None]
        shared: dict[str, Any] = {}
        if any("token_ids" in getattr(channel, "takes", ()) for channel in channels):
            shared["token_ids"] = tokens
        if gates is None:
            return over_depth, shared, None
        shared["first_gate"] = gates[0]
        none = jnp.zeros((*tokens.shape, gates.shape[-1]), gates.dtype)
        return self._with_next_gates(over_depth, gates), shared, Announced(jnp.zeros((), bool), none)

    @property
    def _pre_gated(self) -> list[int]:
        """The blocks with a mixture of experts that is routed by the one before it."""
        return [i for i, block in enumerate(self.blocks) if block.router_reads == "previous"]

    def _gates(self) -> Array:
        """The gates [N, D, E] of N pre-gated mixtures: the first reads its own input, others the last's."""
        channels = [
            self.blocks[i].channel_class(**dict(self.blocks[i].channel_args)) for i in self._pre_gated
        ]
        experts = channels[0].experts
        if any(channel.experts != experts for channel in channels):
            raise ValueError(
                f"blocks: got {[channel.experts for channel in channels]} experts with "
                "router_reads='previous'; expected the same number in all"
            )
        init = nn.initializers.variance_scaling(
            0.1, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=0
        )
        shape = (self.repeats * len(channels), self.width, experts)
        return self.param("pre_gates", init, shape, accumulator(jnp.dtype(self.param_dtype)))

    def _with_next_gates(self, over_depth: tuple[Any, ...], gates: Array) -> tuple[Any, ...]:
        """Give each pre-gated layer the gate that it applies for the next; the last one's is zeros."""
        ahead = jnp.concatenate([gates[1:], jnp.zeros_like(gates[:1])])
        ahead = ahead.reshape(self.repeats, -1, *gates.shape[1:])
        new = list(over_depth)
        for place, i in enumerate(self._pre_gated):
            new[i] = (new[i][0], new[i][1] | {"next_gate": ahead[:, place]})
        return tuple(new)

    def _check(self, tokens: Array, state: DecoderState | None, segment_ids: Array | None) -> None:
        for name in ("vocab_size", "width", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a number >= 1")
        listed = self.blocks if isinstance(self.blocks, tuple | list) else ()  # one Block alone is none
        if not listed or not all(isinstance(block, Block) for block in listed):
            raise ValueError(
                f"blocks: got {self.blocks!r}; expected a tuple of at least one frugax.layers.Block"
            )
        if self.ternary_head and self.tie_embeddings:
            raise ValueError("tie_embeddings: got True with ternary_head=True; expected False")
        for block in self.blocks:
            if dict(block.channel_args).get("router") == "soft_route":
                raise ValueError(
                    "router: got 'soft_route', which mixes in later tokens; expected a causal router"
                )
        check_remat(self._remat, self.offload)
        channels = [block.channel_class for block in self.blocks if block.channel is not None]
        if self.mlp_tiles < 1 or (self.mlp_tiles > 1 and not any(map(is_pointwise, channels))):
            found = ", ".join(channel.__name__ for channel in channels) or "none"
            raise ValueError(
                f"mlp_tiles: got {self.mlp_tiles} with channel mixers {found}; expected a number >= 1, and "
                "GLU or MLP among them if it is above 1"
            )
        check_backend(self.backend)
        if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens: got {tokens.dtype}{list(tokens.shape)}; expected integers [batch, time >= 1]"
            )
        check_segment_ids(segment_ids, tokens.shape)
        if state is None:
            return
        leaves = jax.tree.leaves(state.layers)
        if len(state.layers) != len(self.blocks) or any(
            leaf.shape[:2] != (self.repeats, tokens.shape[0]) for leaf in leaves
        ):
            shapes = sorted({leaf.shape[:2] for leaf in leaves})
            raise ValueError(
                f"state: got {len(state.layers)} blocks of [repeats, batch] {shapes}; "
                f"expected {len(self.blocks)} blocks of ({self.repeats}, {tokens.shape[0]})"
            )


class _Layers(nn.Module):
    """One repeat of the blocks: the body of the scan over depth."""

    blocks: tuple[Block, ...]
    depth: int
    remat: str
    offload: bool
    mlp_tiles: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    backend: Backend | None
    segment_states: int | None

    @nn.compact
    def __call__(self, carry, states, over_depth, rows, new_document, shared):
        x, announced = carry
        layer = BlockLayer
        if self.remat != "none":
            # prevent_cse costs fusion, and a scan needs none of it.
            policy = remat_policy(self.remat, offload=self.offload)
            layer = nn.remat(BlockLayer, prevent_cse=False, policy=policy)
        after = []
        for i, block in enumerate(self.blocks):
            how = (self.depth, self.dtype, self.param_dtype, self.backend, self.segment_states)
            one = layer(block, *how, self.mlp_tiles, name=f"block_{i}")
            x, state, announced = one(x, states[i], over_depth[i], rows, new_document, shared, announced)
            after.append(state)
        return (x, announced), tuple(after)


def _documents(
    before: Array | None, segment_ids: Array | None, read: Rows | None
) -> tuple[Array | None, Array | None]:
    """Tell the rows that start a document with this call, and the segments that they end in, to carry on.

    Args:
      before: each row's segment before the call [B]; None where no call has said.
      segment_ids: those of the call's tokens as read [B, T], or None: the row's document goes on.
      read: how the rows are read.

    Returns:
      (bool [B], or None: none starts; the last real token's segment [B], or that of each document [B, N]).
    """
    starts = None
    if before is not None and segment_ids is not None:
        starts = segment_ids[:, 0] != before
        if read is not None and read.lengths is not None:
            starts &= read.lengths > 0  # a row without a token stays where it was
    last = before if segment_ids is None else segment_ids[:, -1]
    if read is None or last is None:
        return starts, last
    ids = jnp.broadcast_to(last[:, None], read.shape) if segment_ids is None else segment_ids
    return starts, read.states_by_place(last, lambda at: outputs_at(ids, before, at))
