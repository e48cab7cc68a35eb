"""Optimizers that factor at each step: all leaves at once as each alone, with the threads a user has."""

import jax
import numpy as np

from frugax import optim
from tests.errors import assert_close

SHAPES = [(8, 160, 320), (8, 320, 160), (8, 160, 160), (6, 160, 480), (8, 200, 160)]
OPTIMIZERS = {
    "cosmos": optim.cosmos(0.1, rank=16),
    # With so long a history jaxlib finds the stacks worth sharing.
    "natural_galore": optim.natural_galore(0.1, rank=16, history=64),
}


def main():
    rng = np.random.default_rng(0)
    g = {f"l{i}": {"kernel": rng.normal(size=s).astype(np.float32)} for i, s in enumerate(SHAPES)}
    for name, opt in OPTIMIZERS.items():
        update = jax.jit(opt.update)
        start = opt.init(g)
        state = start
        for _ in range(60):  # whether threads meet is chance
            _, state = jax.block_until_ready(update(g, state, g))
        together, _ = update(g, start, g)
        for leaf in g:
            one = {leaf: g[leaf]}
            alone, _ = update(one, opt.init(one), one)
            assert_close(together[leaf], alone[leaf], "float32", times=4, name=f"{name} {leaf}")


if __name__ == "__main__":
    main()
