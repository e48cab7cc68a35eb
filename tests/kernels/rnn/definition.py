"""The cells in numpy, token by token and head by head; they also take complex numbers and axes in front."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def maximum(x, y):
    return np.where(x.real >= y.real, x, y)


def lstm(x, r, state):
    _, c = state
    i, f, z, o = (x[g] + r[g] for g in range(4))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
    return sigmoid(o) * np.tanh(c), c


def gru(x, r, state):
    reset, update = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    new = np.tanh(x[2] + reset * r[2])
    return (update * state[0] + (1 - update) * new,)


def elman(x, r, state):
    return (np.tanh(x[0] + r[0]),)


def slstm(x, r, state):
    _, c, n, m = state
    i, f, z, o = (x[g] + r[g] for g in range(4))
    kept = np.where(n == 0, -np.inf, np.log(sigmoid(f)) + m)
    m = maximum(i, kept)
    c = np.exp(kept - m) * c + np.exp(i - m) * np.tanh(z)
    n = np.exp(kept - m) * n + np.exp(i - m)
    return sigmoid(o) * c / n, c, n, m


CELLS = {"lstm": (lstm, 4, 2), "gru": (gru, 3, 1), "elman": (elman, 1, 1), "slstm": (slstm, 4, 4)}


def rnn(gates, recurrent, bias=None, initial_state=None, cell="lstm", segment_ids=None):
    """(h [..., B, T, H, D], states [..., B, S, H, D])."""
    step, G, S = CELLS[cell]
    B, _, H, _, D = gates.shape[-5:]
    bias = np.zeros((H, G, D)) if bias is None else bias
    initial_state = np.zeros((B, S, H, D)) if initial_state is None else initial_state
    *more, B, T, H, _, D = np.broadcast_shapes(gates.shape, (*initial_state.shape[:-4], *gates.shape[-5:]))
    if recurrent.ndim > 4:
        more = recurrent.shape[:-4]
    if bias.ndim > 3:
        more = bias.shape[:-3]
    dtype = np.result_type(gates, recurrent, bias, initial_state)
    out = np.zeros((*more, B, T, H, D), dtype)
    states = np.zeros((*more, B, S, H, D), dtype)
    for h in range(H):
        state = [np.broadcast_to(initial_state[..., s, h, :], (*more, B, D)) for s in range(S)]
        for t in range(T):
            if segment_ids is not None and t > 0:
                starts = segment_ids[:, t] != segment_ids[:, t - 1]
                state = [np.where(starts[:, None], 0, s) for s in state]
            x = [gates[..., t, h, g, :] for g in range(G)]
            r = [state[0] @ recurrent[..., h, g, :, :] + bias[..., None, h, g, :] for g in range(G)]
            state = step(x, r, state)
            out[..., t, h, :] = state[0]
        for s in range(S):
            states[..., s, h, :] = state[s]
    return out, states
