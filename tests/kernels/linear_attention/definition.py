"""Linear attention in numpy, in plain loops over tokens; works on complex numbers."""

import numpy as np


def linear_attention(
    q, k, v, log_decay=None, *, feature_map=None, bonus=None, scale=None, initial_state=None, segment_ids=None
):
    """(out, final state) of the equation, head by head."""
    if feature_map == "taylor":
        q, k = (np.apply_along_axis(taylor, -1, x) for x in (q, k))
    B, T = q.shape[:2]
    H, K, V = max(x.shape[2] for x in (q, k, v)), q.shape[3], v.shape[3]
    q, k, v = (np.repeat(x, H // x.shape[2], axis=2) for x in (q, k, v))
    given = [x for x in (q, k, v, log_decay, bonus, initial_state) if x is not None]
    log_decay = np.zeros(H) if log_decay is None else log_decay
    if log_decay.ndim < 4:
        log_decay = np.broadcast_to(log_decay, (B, T, H))[..., None]
    scale = K**-0.5 if scale is None else scale
    states = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    out, last = (np.zeros(shape, np.result_type(*given)) for shape in ((B, T, H, V), states.shape))
    for b in range(B):
        for h in range(H):
            S = states[b, h]
            for t in range(T):
                if segment_ids is not None and t > 0 and segment_ids[b, t] != segment_ids[b, t - 1]:
                    S = np.zeros_like(S)
                kv = np.outer(k[b, t, h], v[b, t, h])
                decayed = np.exp(log_decay[b, t, h])[:, None] * S + kv
                read = decayed if bonus is None else S + bonus[h][:, None] * kv
                out[b, t, h] = scale * q[b, t, h] @ read
                S = decayed
            last[b, h] = S
    return out, last


def taylor(x):
    """1, every entry, and every product of two entries once, those of one entry over sqrt(2)."""
    pairs = [(i, j) for i in range(len(x)) for j in range(i, len(x))]
    squares = [x[i] * x[j] / (np.sqrt(2) if i == j else 1) for i, j in pairs]
    return np.array([1, *x, *squares])
