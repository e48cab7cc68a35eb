"""COSMOS on the stacks of several leaves at once, as each alone: a program with the threads a user has."""

import jax
import numpy as np

from frugax import optim
from tests.errors import assert_close

SHAPES = [(8, 160, 320), (8, 320, 160), (8, 160, 160), (6, 160, 480), (8, 200, 160)]


def main():
    opt = optim.cosmos(0.1, rank=16)
    rng = np.random.default_rng(0)
    g = {f"l{i}": {"kernel": rng.normal(size=s).astype(np.float32)} for i, s in enumerate(SHAPES)}
    update = jax.jit(opt.update)
    start = opt.init(g)
    state = start
    for _ in range(60):  # whether threads meet is chance
        _, state = jax.block_until_ready(update(g, state, g))
    together, _ = update(g, start, g)
    for name, leaf in g.items():
        alone, _ = jax.jit(opt.update)({name: leaf}, opt.init({name: leaf}), {name: leaf})
        assert_close(together[name], alone[name], "float32", times=4, name=name)


if __name__ == "__main__":
    main()
