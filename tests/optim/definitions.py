"""Shared parts of the papers' algorithms in NumPy: our optimizer over 50 steps, and Adam."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from frugax.optim.common.leafwise import Turn
from frugax.optim.low_rank.refresh import Refresh, schedule

STEPS, EVERY, RATE = 50, 8, 0.1
B1, B2, EPS = 0.9, 0.999, 1e-8


def ours(make, g, **tree):
    """Updates [steps, m, n] of the optimizer that `make()` returns, in float64; optionally from params."""
    with jax.enable_x64(True):
        opt = make()
        params = {"kernel": jnp.asarray(tree.get("w", np.zeros(g.shape[1:])))}

        def step(state, g):
            updates, state = opt.update({"kernel": g}, state, params)
            return state, updates["kernel"]

        return np.asarray(jax.jit(lambda g: jax.lax.scan(step, opt.init(params), g)[1])(jnp.asarray(g)))


class Adam:
    def __init__(self, eps=EPS):
        self.m = self.v = self.t = 0
        self.eps = eps

    def __call__(self, g):
        self.t += 1
        self.m = B1 * self.m + (1 - B1) * g
        self.v = B2 * self.v + (1 - B2) * g * g
        return self.m / (1 - B1**self.t) / (np.sqrt(self.v / (1 - B2**self.t)) + self.eps)


def key_at(projector, path, step):
    """The key with which a leaf draws its projection at `step`."""
    path_hash = np.uint32(zlib.crc32(path.encode()))
    return schedule(Refresh(EVERY), projector, 0, Turn(0, 1, jnp.asarray(step, jnp.int32), path_hash))[0]
