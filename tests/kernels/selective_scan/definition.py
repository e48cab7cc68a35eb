"""The selective scan in numpy, token by token; works on complex numbers."""

import numpy as np


def one_row(
    x, dt, A, B, C, D=None, *, z=None, dt_bias=None, dt_softplus=False, initial_state=None, segment_ids=None
):
    """(y, final state) of one sequence, without a batch axis: x [T, D], B [T, N], states [D, N]."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = np.log(1 + np.exp(dt))
    h = np.zeros(A.shape) if initial_state is None else initial_state
    rows = []
    for t in range(len(x)):
        if segment_ids is not None and t > 0 and segment_ids[t] != segment_ids[t - 1]:
            h = np.zeros(A.shape)
        h = np.exp(dt[t][:, None] * A) * h + np.outer(dt[t] * x[t], B[t])
        y = h @ C[t]
        if D is not None:
            y = y + D * x[t]
        if z is not None:
            y = y * z[t] / (1 + np.exp(-z[t]))
        rows.append(y)
    return np.stack(rows), h


def selective_scan(x, **arguments):
    """(y, final state) of a batch."""
    shared = ("A", "D", "dt_bias", "dt_softplus")
    rows = [
        one_row(x[b], **{name: a if name in shared else a[b] for name, a in arguments.items()})
        for b in range(len(x))
    ]
    y, state = zip(*rows, strict=True)
    return np.stack(y), np.stack(state)
