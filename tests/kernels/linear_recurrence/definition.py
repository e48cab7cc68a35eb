"""The recurrence in numpy, token by token, and its gradient without any rule of differentiation."""

import numpy as np


def recurrence(a, b, initial_state=None, segment_ids=None, reverse=False):
    """(h, h_T) with time on axis -2. Works on complex numbers, and on extra axes before the batch."""
    T = a.shape[-2]
    tokens = range(T - 1, -1, -1) if reverse else range(T)
    state = np.zeros_like(b[..., 0, :]) if initial_state is None else initial_state
    h = np.zeros(a.shape, np.result_type(a, b, state))
    before = None
    for t in tokens:
        if segment_ids is not None and before is not None:
            state = np.where((segment_ids[:, t] != segment_ids[:, before])[:, None], 0, state)
        state = a[..., t, :] * state + b[..., t, :]
        h[..., t, :] = state
        before = t
    return h, state


def gradients(a, b, initial_state, segment_ids, reverse, dh, dstate):
    """Gradients of sum(h * dh) + sum(h_T * dstate) for a, b, initial_state.

    By complex steps, f(x + i e) = f(x) + i e f'(x) to the last bit: channels and rows don't mix, so one call
    moves one token in all of them, and all tokens' calls are stacked on a new first axis.
    """
    T, e = a.shape[1], 1e-100
    moved = 1j * e * np.eye(T)[:, None, :, None]

    def slopes(a, b, initial_state):
        h, state = recurrence(a, b, initial_state, segment_ids, reverse)
        return ((h * dh).sum(-2) + state * dstate).imag / e

    da = np.moveaxis(slopes(a + moved, np.broadcast_to(b, (T, *b.shape)), initial_state), 0, 1)
    db = np.moveaxis(slopes(np.broadcast_to(a, (T, *a.shape)), b + moved, initial_state), 0, 1)
    start = np.zeros_like(b[:, 0]) if initial_state is None else initial_state
    return da, db, slopes(a, b, start + 1j * e)
