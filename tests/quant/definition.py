"""GPTQ and AWQ in float64 NumPy, as the papers define them; a format only rounds, in groups of rows."""

import functools

import jax
import numpy as np

from frugax.formats import format_named
from frugax.formats.scales import split


@functools.cache
def _fit(format, g):
    format = format_named(format)
    return jax.jit(lambda w: format.fit(split(w, g)))


@functools.cache
def _round(format, g):
    format = format_named(format)
    return jax.jit(lambda w, scaling: format.decode(format.encode(split(w, g), scaling), scaling))


def fit(w, format, g):
    """Compute what a format stores for the groups of g rows of w [K, N]."""
    return _fit(format, g)(np.asarray(w.T, np.float32))


def rounded(w, scaling, format, g):
    """The values of the format that are nearest to w's, float64."""
    q = _round(format, g)(np.asarray(w.T, np.float32), scaling)
    return np.asarray(q, np.float64).reshape(w.shape[1], -1)[:, : len(w)].T


def nearest(w, format, g):
    """Round to the nearest in groups of g rows: the values, float64."""
    return rounded(w, fit(w, format, g), format, g)


def obq(w, gram, format, g, *, damping=0.01, act_order=False, static_groups=False):
    """Optimal Brain Quantization in a fixed order, with the inverse of what remains taken anew for each row.

    Source: Frantar et al. 2022 (arXiv 2210.17323), equations 2 and 3.
    """
    w, gram = np.array(w, np.float64), np.array(gram, np.float64)
    static = static_groups or act_order or not format_named(format).scheme.by_group
    alive = np.diag(gram) > 0
    H = gram + np.diag(np.where(alive, damping * np.diag(gram)[alive].mean(), 1.0))
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(len(w))
    scaling = fit(w, format, g)
    q = np.zeros_like(w)
    for place, k in enumerate(order):
        if k % g == 0 and not static:
            scaling = fit(w, format, g)  # of which this group's will be read
        q[k] = rounded(w, scaling, format, g)[k]
        left = order[place:]
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        w[left] -= inverse[:, :1] * (w[k] - q[k]) / inverse[0, 0]
    return q


def awq(matrices, x, format, g, grid):
    """The scales with the least error of rounding to the nearest, over the inputs themselves."""
    mean_abs = np.abs(x).mean(0)
    best, best_scale = np.inf, None
    for i in range(grid):
        s = np.maximum(mean_abs ** (i / grid), 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        error = 0.0
        for w in matrices:
            error += ((x @ (nearest(s[:, None] * w, format, g) / s[:, None] - w)) ** 2).sum()
        if error < best:
            best, best_scale = error, s
    return best_scale


def error(w, q, x):
    """||X W - X Q|| / ||X W||."""
    w, q, x = (np.asarray(a, np.float64) for a in (w, q, x))
    return np.linalg.norm(x @ (w - q)) / np.linalg.norm(x @ w)


def inputs(n, K, seed=0):
    """Correlated inputs [n, K] with two channels of outliers, and one that is always zero."""
    rng = np.random.default_rng(seed)
    few = rng.normal(size=(n, K // 3)) @ rng.normal(size=(K // 3, K))
    x = few + 0.3 * rng.normal(size=(n, K))
    x[:, [1, K - 2]] *= 4
    x[:, 2] = 0
    return x.astype(np.float32)


def weights(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
