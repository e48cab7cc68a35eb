"""The selective scan in numpy, token by token; works on complex numbers."""

import numpy as np


def selective_scan(
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


def slopes(y_weights, state_weights, arguments, directions):
    """d/de of sum(y * y_weights) + sum(state * state_weights) as each argument moves along its direction.

    By complex steps, f(x + i e) = f(x) + i e f'(x) to the last bit. All arguments have a batch axis but those
    in ONE_FOR_ALL.
    """
    return {name: _slope(y_weights, state_weights, arguments, name, directions[name]) for name in directions}


ONE_FOR_ALL = ("A", "D", "dt_bias", "dt_softplus")


def row(arguments, b):
    return {name: x if name in ONE_FOR_ALL else x[b] for name, x in arguments.items()}


def _slope(y_weights, state_weights, arguments, name, direction):
    e = 1e-100
    moved = {**arguments, name: arguments[name] + 1j * e * direction}
    total = 0.0
    for b in range(len(arguments["x"])):
        y, state = selective_scan(**row(moved, b))
        total += (np.sum(y * y_weights[b]) + np.sum(state * state_weights[b])).imag / e
    return total
