"""The recurrence in numpy, token by token; works on complex numbers."""

import numpy as np


def linear_recurrence(a, b, initial_state=None, segment_ids=None, reverse=False):
    """(h, h_T) with time on axis -2."""
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
