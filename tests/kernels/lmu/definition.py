"""The Legendre delay system held for one token by scipy, in a loop over tokens; works on complex numbers."""

import numpy as np
import scipy.signal


def system(order, theta):
    """The continuous A, B of the paper, entry by entry, held for one token by scipy."""
    A = np.zeros((order, order))
    for i in range(order):
        for j in range(order):
            A[i, j] = (2 * i + 1) / theta * (-1 if i < j else (-1) ** (i - j + 1))
    B = np.array([[(2 * i + 1) / theta * (-1) ** i] for i in range(order)])
    return scipy.signal.cont2discrete((A, B, np.eye(order), np.zeros((order, 1))), dt=1.0)[:2]


def lmu(u, order, theta, *, initial_state=None, segment_ids=None):
    """(m, final memory)."""
    A, B = system(order, theta)
    m = np.zeros((u.shape[0], u.shape[2], order)) if initial_state is None else initial_state
    out = []
    for t in range(u.shape[1]):
        if segment_ids is not None and t > 0:
            m = np.where((segment_ids[:, t] == segment_ids[:, t - 1])[:, None, None], m, 0)
        m = m @ A.T + u[:, t, :, None] * B[:, 0]
        out.append(m)
    return np.stack(out, axis=1), m
