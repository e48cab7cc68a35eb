"""The causal convolution in numpy, tap by tap; works on complex numbers."""

import numpy as np


def _taps(x, width, initial_state, segment_ids):
    """The state followed by the inputs, and (batch, token, tap, row of it) of every product in the sum."""
    B, T, D = x.shape
    if initial_state is None:
        initial_state = np.zeros((B, width - 1, D))
    history = np.concatenate([initial_state, x], axis=1)
    document = np.zeros((B, T + width - 1), int)
    if segment_ids is not None:
        for b in range(B):
            for t in range(1, T):
                new = segment_ids[b, t] != segment_ids[b, t - 1]
                document[b, t + width - 1] = document[b, t + width - 2] + new
    taps = [
        (b, t, w, t + w)
        for b in range(B)
        for t in range(T)
        for w in range(width)
        if document[b, t + w] == document[b, t + width - 1]
    ]
    return history, document, taps


def causal_conv1d(x, weight, bias=None, *, activation=None, initial_state=None, segment_ids=None):
    """y and the final state."""
    W = weight.shape[0]
    history, document, taps = _taps(x, W, initial_state, segment_ids)
    z = np.zeros_like(history[:, : x.shape[1]]) + weight[0] * 0
    for b, t, w, row in taps:
        z[b, t] += weight[w] * history[b, row]
    if bias is not None:
        z = z + bias
    y = z / (1 + np.exp(-z)) if activation else z
    T = x.shape[1]
    state = np.where((document[:, T:] == document[:, -1:])[..., None], history[:, T:], 0)
    return y, state
