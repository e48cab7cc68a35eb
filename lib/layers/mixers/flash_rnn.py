"""Recurrent networks of several heads as a sequence mixer: LSTM, GRU, Elman network, sLSTM."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ...kernels import rnn
from ...kernels.rnn.cells import find
from ...parallel.over_time import refuse_split_time
from ..modules.heads import head_size, merge_heads
from ..modules.norms import HeadLayerNorm
from ..modules.packed import as_array, matrix_param
from .mixer import Mixer, RowArguments


class FlashRNNState(NamedTuple):
    """The cell's states [B, S, H, D], h first."""

    memory: Array


class FlashRNN(Mixer):
    """y_t = W_out HeadLayerNorm(h_t), with h of a recurrent network whose heads are apart from each other.

    Attributes:
      heads: divides the width.
      cell: "lstm", "gru", "elman" or "slstm", as in `frugax.kernels.rnn`.
      forget_bias: what the biases of an LSTM's and an sLSTM's forget gates start from: `forget_bias` for each
        head's first channel, up to twice that for its last.
      normalize: norm each head of h.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    Source: FlashRNN, Pöppel et al. 2024 (arXiv 2412.07752); forget biases that spread over channels and the
    norm of each head from xLSTM (2405.04517), whose convolution and block are left out.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.FlashRNN(heads=2, cell="slstm")
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.memory.shape
        ((1, 7, 16), (1, 4, 2, 8))
    """

    heads: int = 4
    cell: str = "lstm"
    forget_bias: float = 3.0
    normalize: bool = True

    @nn.compact
    def mix(self, x: Array, state: FlashRNNState | None, rows: RowArguments) -> tuple[Array, FlashRNNState]:
        refuse_split_time("FlashRNN", f"of {self.cell!r} a token is no affine map of the state before it")
        W, H, G = x.shape[-1], self.heads, find(self.cell).gates
        D = head_size("width", W, H)
        second = self.cell == "gru"  # whose n has one bias inside its reset gate, and one outside
        gates = self.dense(x, H * G * D, "gates", use_bias=second).reshape(*x.shape[:2], H, G, D)
        matrices = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0, 1))
        recurrent = matrix_param(self, "recurrent", matrices, (H, G, D, D), self.param_dtype)
        bias = self.param("bias", self._bias, (H, G, D), self.param_dtype)
        h_BTHD, memory = rnn(
            gates,
            as_array(recurrent, x.dtype),
            bias.astype(x.dtype),
            cell=self.cell,
            initial_state=None if state is None else state.memory,
            **rows,
            backend=self.backend,
        )
        if self.normalize:
            h_BTHD = HeadLayerNorm(param_dtype=self.param_dtype, name="norm")(h_BTHD)
        return self.output(merge_heads(h_BTHD), W), FlashRNNState(memory)

    def _bias(self, key, shape, dtype):
        zeros = jnp.zeros(shape, dtype)
        if self.cell not in ("lstm", "slstm"):
            return zeros
        return zeros.at[:, 1].set(
            jnp.linspace(self.forget_bias, 2 * self.forget_bias, shape[-1], dtype=dtype)
        )
