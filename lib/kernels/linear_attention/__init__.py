"""Linear attention with every kind of decay: the public function."""

import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from ..common.arguments import as_shaped
from ..common.operation import Backend, Operation
from ..common.rows import rows
from .features import widened
from .inputs import FeatureMap, Inputs, check, feature_count, in_reading_order
from .states import states_at

OPERATION = Operation(
    "linear_attention",
    Inputs("b t h k", "b t h k", "b t h v", "h | b t h | b t h k", "h k", "b h k v", "b t"),
    ("b t h v", "b h k v"),
    independent=("b", "h"),
    sequence="q",
    static=("feature_map",),
    documents="runs",
    gates=("log_decay",),
)


def linear_attention(
    q: Float[Array, "b t hq k"],
    k: Float[Array, "b t hk k"],
    v: Float[Array, "b t hv v"],
    log_decay: Float[Array, "h"] | Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    *,
    feature_map: FeatureMap | None = None,
    bonus: Float[Array, "h k"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "b h f v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    segment_states: int | None = None,
    reverse: bool = False,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b *n h f v"]]:
    """Causal linear attention, S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T and o_t = scale * q_t S_t.

    Args:
      q, k, v: queries, keys, values, one floating dtype. Their head counts may differ: H is the largest, and
        each divides it (grouped-query when k and v have fewer, Mamba-2's groups when q and k have fewer).
      log_decay: log of the decay, <= 0. None for no decay; [H], fixed (Lightning, RetNet); [B, T, H], one a
        token and head (Mamba-2, simple GLA); [B, T, H, K], one a channel (GLA, RWKV-6, HGRN-2). A positive
        value is caught under `jax.experimental.checkify` (`errors=checkify.all_checks` or `user_checks`).
      feature_map: the map of q and k that the kernel makes itself, a chunk at a time, so that features never
        lie in memory: "taylor" (`frugax.layers.taylor`), whose F = 1 + K + K (K + 1) / 2 features stand in
        K's place in the equation and the state. No bonus, and one decay a head at most. None: q and k as
        they are, F = K.
      bonus: RWKV-6's weight u of the current token. With it a token reads the state before its own decay:
        o_t = scale * q_t (S_{t-1} + diag(u) k_t v_t^T).
      scale: multiplies the output; None means F**-0.5.
      initial_state: the state before the first token; None means zeros.
      segment_ids: the document of each token; the state restarts wherever the id changes. The initial state
        belongs to the first token's document.
      lengths: how many tokens of each row are real [B]; None means all. Those after them are not read, so
        nothing that stands there matters; their outputs are zeros.
      segment_states: return the states after each of a row's first N documents [B, N, ...] instead of its
        last; zeros for documents that a row does not have.
      reverse: read each row from its last real token to its first.
      backend: None picks by the platform the program is lowered for; or "reference", "xla", "pallas_tpu",
        "pallas_gpu". A Pallas backend named on CPU runs interpreted.

    Returns:
      out [B, T, H, V] in v's dtype, and the state after the last token [B, H, F, V] in float32 (float64 for
      float64 inputs), ready to be the next call's `initial_state`.

    Raises:
      ValueError: naming the argument that can't be right, or the reason why a named backend can't serve.

    Differentiable in every float input. `jax.jvp` and second derivatives: with backend "reference" or "xla".
    float16 is computed in float32. With `segment_ids` a NaN or infinity stays in its document, in outputs,
    state and gradients; without them it may also reach the outputs before it in its chunk.

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236); decays from Lightning Attention (2405.17381), GLA
    (2312.06635) and RWKV-6 (2404.05892); the Taylor map from Based (2402.18668).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 32))
        >>> gate = jax.nn.log_sigmoid(jax.random.normal(jax.random.key(1), (2, 100, 4, 32)))
        >>> out, state = frugax.kernels.linear_attention(q, k, v, gate)
        >>> out.shape, state.shape
        ((2, 100, 4, 32), (2, 4, 32, 32))
    """
    arrays = (as_shaped(x) for x in (q, k, v, log_decay, bonus, initial_state, segment_ids))
    call = check(*arrays, feature_map=feature_map)
    if call.log_decay is not None:
        checkify.debug_check(jnp.all(call.log_decay <= 0), "log_decay: a value is positive; expected <= 0")
    read = rows(call.q.shape[:2], segment_ids, lengths, segment_states, reverse)
    if read is not None:
        call = in_reading_order(call, read)
    if scale is None:
        scale = feature_count(call.q.shape[-1], feature_map) ** -0.5
    out, state = OPERATION(call, backend, scale=float(scale), feature_map=feature_map)
    if read is None:
        return out, state
    return read.write(out), read.states(state, lambda places: states_at(widened(call, feature_map), places))
