"""Based: Taylor linear attention for all of the past beside exact attention to the last few tokens."""

from typing import NamedTuple

from flax import linen as nn
from jax import Array

from ..block import Block
from .linear_attention import LinearAttention, LinearAttentionState
from .mixer import Mixer, RowArguments
from .sliding_window import SlidingWindowAttention, WindowState


class BasedState(NamedTuple):
    """States of both halves; their size sets how much the layer can recall."""

    linear: LinearAttentionState
    window: WindowState


class Based(Mixer):
    """(LinearAttention(x) + SlidingWindowAttention(x)) / sqrt(2): both halves in every layer.

    The paper gives each kind layers of its own, with convolutions between: those are `based_blocks`.

    Attributes:
      heads: of both halves; divides the width.
      key_size: channels of q and k in each head of the linear half; its features are 1 + d + d (d + 1) / 2.
      window: how many tokens the exact half sees, the token itself included.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    Source: Arora et al. 2024 (arXiv 2402.18668).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.Based(heads=2, key_size=4, window=8)
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.linear.memory.shape, state.window.k.shape
        ((1, 7, 16), (1, 2, 15, 9), (1, 7, 2, 8))
    """

    heads: int = 4
    key_size: int = 16
    window: int = 64

    @nn.compact
    def mix(self, x: Array, state: BasedState | None, rows: RowArguments) -> tuple[Array, BasedState]:
        shared = {
            "heads": self.heads,
            "param_dtype": self.param_dtype,
            "backend": self.backend,
            "out_scale": self.out_scale * 0.5**0.5,  # two halves add up to one output's size
        }
        linear = LinearAttention(feature_map="taylor", key_size=self.key_size, **shared, name="linear")
        window = SlidingWindowAttention(window=self.window, **shared, name="window")
        before = BasedState(None, None) if state is None else state
        y_linear, linear_state = linear(x, state=before.linear, **rows)
        y_window, window_state = window(x, state=before.window, **rows)
        return y_linear + y_window, BasedState(linear_state, window_state)


def based_blocks(
    heads: int = 16, *, key_size: int = 16, window: int = 64, expand: int | float = 2
) -> tuple[Block, ...]:
    """Based's layers, five to be repeated: convolution, linear attention, window, and two convolutions.

    Each has a SwiGLU behind its mixer, and an RMSNorm before both.

    Args:
      heads, key_size: of the `LinearAttention`, whose feature map is "taylor".
      window: of the `SlidingWindowAttention`.
      expand: of each `GLU`.

    Source: Arora et al. 2024 (Based, arXiv 2402.18668); the order is that of its code, whose models of 27
    layers end with two convolutions more, and whose convolutions' layers have biases.

    Example:
        >>> import frugax
        >>> [block.mixer for block in frugax.layers.based_blocks(heads=2)][:3]
        ['GatedConvolution', 'LinearAttention', 'SlidingWindowAttention']
    """

    def block(mixer: str, **arguments: int | str) -> Block:
        return Block(mixer, "GLU", arguments, {"expand": expand})

    convolution = block("GatedConvolution", width=3, expand=2)
    linear = block("LinearAttention", heads=heads, feature_map="taylor", key_size=key_size)
    exact = block("SlidingWindowAttention", heads=heads, window=window)
    return convolution, linear, exact, convolution, convolution
