"""The stable embedding: a Xavier-uniform table, a layer norm behind it, 32-bit state by a mask."""

import jax
import jax.numpy as jnp
import numpy as np

import frugax
from tests.errors import assert_close


def test_definition_and_state():
    module = frugax.layers.StableEmbedding(vocabulary=500, features=64)
    tokens = jnp.array([[3, 7, 7], [499, 0, 1]])
    params = module.init(jax.random.key(0), tokens)["params"]
    table = np.asarray(params["embed"]["embedding"], np.float64)
    limit = np.sqrt(6 / (500 + 64))
    assert 0.99 * limit < np.abs(table).max() <= limit
    assert abs(table.std() / (limit / np.sqrt(3)) - 1) < 0.02
    rows = table[np.asarray(tokens)]
    centred = rows - rows.mean(-1, keepdims=True)
    want = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-6)
    assert_close(module.apply({"params": params}, tokens), want, "float32")
    how = frugax.optim.EightBit(full_precision=frugax.optim.is_embedding)
    tree = {"in": params, "out": jnp.ones((64, 500))}
    m = frugax.optim.scale_by_adam_8bit(moments=how).init(tree).moments[0]
    assert m["in"]["embed"]["embedding"].dtype == jnp.float32
    assert m["out"].format.name == "mulaw8"
