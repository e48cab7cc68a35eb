"""LMUFormer: convolutions that embed a signal, blocks around a Legendre memory, and a running verdict."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ..kernels import linear_recurrence
from ..kernels.common.arguments import accumulator
from ..kernels.common.documents import documents
from ..layers.block import Block
from ..layers.modules.dense import Dense, projection
from ..layers.modules.inputs import check_input
from ..layers.modules.norms import RMSNorm
from ..layers.modules.spiking import lif
from ..layers.modules.stacked import STACKED


class LMUFormerState(NamedTuple):
    """States of the embedding, the blocks and the verdict's neurons (None without spikes), and what was read.

    That is the sum and the number of the tokens [B, width + 1].
    """

    embedding: Any
    blocks: Any
    verdict: Array | None
    total: Array


class LMUFormer(nn.Module):
    """Classifies a signal x [B, T, C] after each of its tokens: -> (logits [B, T, classes], state).

    Causal convolutions embed x, `depth` blocks follow, and the logits are W mean(tokens so far) + b: the
    last token's are the verdict on the whole signal. Streams pass the state that the last call returned.

    Attributes:
      classes: how many.
      width: channels of the blocks.
      depth: how many blocks.
      mixer: the blocks' sequence mixer, by its name in `frugax.layers`.
      mixer_args: its attributes.
      expand: hidden width of the channel mixer over the width.
      taps: of each convolution of the embedding.
      spiking: leaky integrate-and-fire neurons in place of relu and gelu. `mixer_args` says it of the mixer.
      dtype, param_dtype: as in `Mixer`.

    Raises:
      ValueError: naming the argument that can't be right.

    Source: Liu et al. 2024 (arXiv 2402.04882), with norms and neurons where its code has them. There
    convolutions are centred (here causal: no delay), and batch norms normalize (here a norm over each token's
    channels).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> model = frugax.layers.LMUFormer(classes=9, width=16, mixer_args={"order": 8, "theta": 29.0})
        >>> x = jnp.ones((2, 29, 12))
        >>> (logits, state), params = model.init_with_output(jax.random.key(0), x)
        >>> logits, state = model.apply(params, x[:, :1], state=state)  # one token more
        >>> logits.shape
        (2, 1, 9)
    """

    classes: int
    width: int = 64
    depth: int = 1
    mixer: str = "LMU"
    mixer_args: Mapping[str, Any] | None = None
    expand: int | float = 4
    taps: int = 3
    spiking: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, *, state: LMUFormerState | None = None, segment_ids: Array | None = None
    ) -> tuple[Array, LMUFormerState]:
        check_input(x, segment_ids)
        for name in ("classes", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a number >= 1")
        block = Block(self.mixer, None, self.mixer_args or {})
        dtypes = {"dtype": self.dtype or x.dtype, "param_dtype": self.param_dtype}
        before = LMUFormerState(None, None, None, None) if state is None else state

        embed = ConvEmbedding(self.width, self.taps, self.spiking, **dtypes, name="embedding")
        x, embedding = embed(x, state=before.embedding, segment_ids=segment_ids)
        blocks = nn.scan(
            _Block,
            **STACKED,
            in_axes=(0, nn.broadcast),
            length=self.depth,
        )(block, self.expand, self.spiking, self.depth, **dtypes, name="blocks")
        x, states = blocks(x, before.blocks, segment_ids)

        verdict = None
        if self.spiking:
            x = RMSNorm(**dtypes, name="norm")(x)
            x, verdict = lif(x, initial_state=before.verdict, segment_ids=segment_ids)
        x = x.astype(accumulator(x.dtype))
        counted = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        totals, total = linear_recurrence(
            jnp.ones_like(counted), counted, initial_state=before.total, segment_ids=segment_ids
        )
        mean = totals[..., :-1] / totals[..., -1:]
        logits = Dense(self.classes, param_dtype=self.param_dtype, name="head")(mean)
        return logits, LMUFormerState(embedding, states, verdict, total)


class ConvEmbedding(nn.Module):
    """Four causal convolutions over all channels, and a fifth added to what the fourth gave.

    norm(relu(conv(x))) four times. With spikes the four are conv(x), with neurons behind a norm in front of
    all but the first, and of the fifth.

    x [B, T, C] -> (y [B, T, width], state): of each convolution its last taps - 1 inputs [B, taps - 1, n],
    and of a spiking embedding also the neurons' potentials.

    Attributes:
      width: channels of each convolution.
      taps: of each convolution, >= 1.
      spiking: neurons that fire in place of relu.
      dtype, param_dtype: as in `Mixer`.

    Source: the patch embedding of Liu et al. 2024 (arXiv 2402.04882), there centred and with batch norm.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = jnp.ones((1, 7, 5))
        >>> (y, state), params = frugax.layers.ConvEmbedding(16).init_with_output(jax.random.key(0), x)
        >>> y.shape
        (1, 7, 16)
    """

    width: int
    taps: int = 3
    spiking: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, *, state: Any = None, segment_ids: Array | None = None
    ) -> tuple[Array, tuple[tuple[Array, ...], tuple[Array, ...]]]:
        check_input(x, segment_ids)
        if self.taps < 1:
            raise ValueError(f"taps: got {self.taps}; expected a number >= 1")
        dtypes = {"dtype": self.dtype or x.dtype, "param_dtype": self.param_dtype}
        x = x.astype(dtypes["dtype"])
        inputs, potentials = ((None,) * 5, (None,) * 4) if state is None else state
        after, fired = [], []
        for i in range(5):
            if i and not self.spiking:
                x = RMSNorm(**dtypes, name=f"norm_{i}")(jax.nn.relu(x))
            last = x
            if i and self.spiking:
                x = RMSNorm(**dtypes, name=f"norm_{i}")(x)
                x, v = lif(x, initial_state=potentials[i - 1], segment_ids=segment_ids)
                fired.append(v)
            x_BTWC, seen = _windows(x, self.taps, inputs[i], segment_ids)
            after.append(seen)
            x = nn.DenseGeneral(self.width, axis=(-2, -1), use_bias=False, **dtypes, name=f"conv_{i}")(x_BTWC)
        return last + x, (tuple(after), tuple(fired))


def _windows(x_BTC: Array, taps: int, before: Array | None, segment_ids: Array | None) -> tuple[Array, Array]:
    """Each token behind the taps - 1 before it [B, T, taps, C], 0 across documents; and the last inputs."""
    B, T, C = x_BTC.shape
    if before is None:
        before = jnp.zeros((B, taps - 1, C), x_BTC.dtype)
    x = jnp.concatenate([before.astype(x_BTC.dtype), x_BTC], axis=1)
    packed = documents(segment_ids, B, T)
    index = jnp.zeros((B, T), jnp.int32) if packed is None else packed.index
    padded = jnp.pad(index, ((0, 0), (taps - 1, 0)))
    windows = [jnp.where((padded[:, i : i + T] == index)[..., None], x[:, i : i + T], 0) for i in range(taps)]
    last = jnp.where((padded == index[:, -1:])[..., None], x, 0)[:, T:]
    return jnp.stack(windows, axis=2), last


class _Block(nn.Module):
    """x + norm(mixer(x)), then x + relu(norm(W_2 gelu(norm(W_1 x)))).

    With spikes x + norm(mixer(norm(x))), then x + W_2 lif(norm(W_1 lif(norm(x)))).
    """

    block: Block
    expand: int | float
    spiking: bool
    depth: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, state: Any, segment_ids: Array | None) -> tuple[Array, Any]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        out_scale = (2 * self.depth) ** -0.5
        mixed, potentials = (None, (None, None)) if state is None else state
        mixer = self.block.mixer_class(
            **dict(self.block.mixer_args), **dtypes, out_scale=out_scale, name="mixer"
        )
        y = RMSNorm(**dtypes, name="mixer_norm")(x) if self.spiking else x
        y, mixed = mixer(y, state=mixed, segment_ids=segment_ids)
        x = x + RMSNorm(**dtypes, name="mixed_norm")(y)

        hidden, out = round(self.expand * x.shape[-1]), x.shape[-1]
        first = projection(hidden, **dtypes, name="channel_in")
        second = projection(out, scale=out_scale, **dtypes, name="channel_out")
        hidden_norm = RMSNorm(**dtypes, name="hidden_norm")
        if not self.spiking:
            y = second(jax.nn.gelu(hidden_norm(first(x))))
            return x + jax.nn.relu(RMSNorm(**dtypes, name="channel_norm")(y)), (mixed, ())
        y = RMSNorm(**dtypes, name="channel_norm")(x)
        y, v_in = lif(y, initial_state=potentials[0], segment_ids=segment_ids)
        y, v_hidden = lif(hidden_norm(first(y)), initial_state=potentials[1], segment_ids=segment_ids)
        return x + second(y), (mixed, (v_in, v_hidden))
