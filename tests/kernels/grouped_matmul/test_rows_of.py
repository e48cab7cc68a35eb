"""Results added up by reading the rows of each token are those added up row by row."""

import jax
import jax.numpy as jnp
import numpy as np

from frugax.kernels import grouped_matmul
from tests.errors import assert_close
from tests.seeds import generator


def test_rows_of_a_token_may_be_read_instead_of_added():
    """Value and gradients; the last token has fewer rows than the others, and a row belongs to no group."""
    rng = generator(7)
    x, W = (rng.standard_normal(s).astype(np.float32) for s in ((9, 4), (3, 4, 5)))
    token = rng.permutation(np.repeat(np.arange(9), 2))[:17].astype(np.int32)
    weights, sizes = rng.uniform(0.2, 1, 17).astype(np.float32), np.array([6, 0, 10], np.int32)
    rows_of = np.full((9, 2), 17, np.int32)
    for row, t in enumerate(token):
        rows_of[t, 0 if rows_of[t, 0] == 17 else 1] = row

    @jax.jit
    def both(x, W, weights):
        def run(rows_of):
            index = jnp.asarray(token)
            how = {"gather": index, "scatter": index, "out_rows": 9, "rows_of": rows_of}

            def loss(x, W, weights):
                return jnp.sum(jnp.sin(grouped_matmul(x, W, jnp.asarray(sizes), weights=weights, **how)))

            return jax.value_and_grad(loss, (0, 1, 2))(x, W, weights)

        return run(jnp.asarray(rows_of)), run(None)

    assert_close(*both(x, W, weights), "float32")
