"""Networks that the tests of zeroth-order steps share."""

import jax
import jax.numpy as jnp
import numpy as np

WIDTH, BLOCKS = 64, 5


def blocks_of_a_network():
    """Functions whose composition is a loss, the parameters of each, and a batch."""

    def block(w, h):
        return jnp.tanh(h @ w["kernel"] + w["bias"][None]) + h

    functions = [lambda w, x: x @ w, *[block] * BLOCKS, lambda w, h: jnp.mean((h @ w - 1) ** 2)]
    rng = np.random.default_rng(0)
    normal = lambda *shape: (0.1 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    parts = [normal(8, WIDTH)]
    parts += [{"kernel": normal(WIDTH, WIDTH), "bias": normal(WIDTH)} for _ in range(BLOCKS)]
    parts += [normal(WIDTH, 1)]
    return functions, parts, jnp.asarray(normal(16, 8))


def network(layers=4, width=64, dtype=jnp.float32):
    """A stack of layers, and its loss on a batch."""
    key = jax.random.key(0)
    params = {
        "w": (0.1 * jax.random.normal(key, (layers, width, width))).astype(dtype),
        "b": jnp.zeros(width, dtype),
    }
    x = jax.random.normal(jax.random.key(1), (8, width), dtype)

    def loss(params):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w) + h, None), x, params["w"])
        return jnp.mean((h + params["b"][None] - 1) ** 2).astype(jnp.float32)

    return params, loss
