"""Mamba-2's and Mamba-3's recurrences in numpy, one token at a time; they work on complex numbers."""

import numpy as np


def ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    *,
    z=None,
    dt_bias=0,
    dt_softplus=False,
    initial_state=None,
    segment_ids=None,
):
    """(y, final state) of Mamba-2."""
    dt = dt + dt_bias
    dt = np.log1p(np.exp(dt)) if dt_softplus else dt
    B, C = (np.repeat(m, x.shape[2] // m.shape[2], axis=2) for m in (B, C))
    b, t, h, p = x.shape
    state = np.zeros((b, h, B.shape[3], p)) if initial_state is None else initial_state
    out = []
    for i in range(t):
        if segment_ids is not None and i > 0:
            new = segment_ids[:, i] != segment_ids[:, i - 1]
            state = np.where(new[:, None, None, None], 0, state)
        state = np.exp(dt[:, i] * A)[..., None, None] * state
        state = state + dt[:, i, :, None, None] * B[:, i, :, :, None] * x[:, i, :, None, :]
        out.append(np.einsum("bhn,bhnp->bhp", C[:, i], state))
    y = np.stack(out, axis=1)
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D) * x
    return (y if z is None else y * z / (1 + np.exp(-z))), state


def trapezoidal_ssd(x, dt, A, B, C, mix, D=None, *, initial_state=None, segment_ids=None):
    """(y, (memory, B, x) after the last token) of Mamba-3."""
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    zeros = np.zeros((b, h, n, p)), np.zeros((b, g, n)), np.zeros((b, h, p))
    memory, B_before, x_before = zeros if initial_state is None else initial_state
    out = []
    for i in range(t):
        if segment_ids is not None and i > 0:
            new = segment_ids[:, i] != segment_ids[:, i - 1]
            memory = np.where(new[:, None, None, None], 0, memory)
            B_before = np.where(new[:, None, None], 0, B_before)
        a = np.exp(dt[:, i] * A[:, i])[..., None, None]
        now = (mix[:, i] * dt[:, i])[..., None, None]
        late = ((1 - mix[:, i]) * dt[:, i])[..., None, None] * a
        kv, kv_before = (
            np.repeat(B_, h // g, axis=1)[..., None] * x_[:, :, None]
            for B_, x_ in ((B[:, i], x[:, i]), (B_before, x_before))
        )
        memory = a * memory + late * kv_before + now * kv
        B_before, x_before = B[:, i], x[:, i]
        read = np.einsum("bhn,bhnp->bhp", np.repeat(C[:, i], h // g, axis=1), memory)
        out.append(read if D is None else read + D[:, None] * x[:, i])
    return np.stack(out, axis=1), (memory, B_before, x_before)
