"""Routed experts: no sorted copies, and the numbers of every expert applied to every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import moe
from tests.errors import assert_close

from .test_dispatch import LOGITS, ROUTINGS, D, E, T, X

full = pytest.mark.full


@pytest.mark.parametrize("routing", [pytest.param(r, marks=[full] * (r != "masked")) for r in ROUTINGS])
@pytest.mark.parametrize("backend", [None, pytest.param("reference", marks=full)])
@pytest.mark.parametrize("ternary", [False, pytest.param(True, marks=full)])
def test_routed_experts_are_the_sum_over_all(routing, backend, ternary):
    """Values and all gradients, those of logits by the weights."""
    rng = np.random.default_rng(1)
    shapes = {"gate_in": (E, D, 8), "out": (E, 4, D + 2)}
    kernels = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    cotangent = rng.standard_normal((T, D + 2)).astype(np.float32)

    def routed(x, routing, kernels):
        return moe.routed_experts(x, routing, kernels, ternary=ternary, backend=backend)

    def every(x, routing, kernels):
        return moe.dense_experts(x, routing.dense_weights(T), kernels, ternary=ternary)

    @jax.jit
    def both(*args):
        def run(apply):
            y, pullback = jax.vjp(lambda s, x, kernels: apply(x, ROUTINGS[routing](s), kernels), *args)
            return y, pullback(jnp.asarray(cotangent))

        return run(routed), run(every)

    (y, (dlogits, *rest)), (want, (dlogits_, *rest_)) = both(LOGITS, X, kernels)
    assert_close((y, rest), (want, rest_), "float32", times=2)
    np.testing.assert_allclose(dlogits, dlogits_, atol=1e-5)  # zeros where a single expert has weight 1


def test_tokens_and_experts_are_those_that_were_routed():
    routing = jax.eval_shape(lambda x: moe.softmax_top_k(x, 1), jnp.ones((4, 2)))
    kernels = {"in": jnp.ones((2, 3, 4)), "out": jnp.ones((2, 4, 3))}
    with pytest.raises(ValueError, match=r"x: got \[5, 3\]; expected the 4 tokens that were routed"):
        jax.eval_shape(lambda x, r: moe.routed_experts(x, r, kernels), jnp.ones((5, 3)), routing)
    routing = jax.eval_shape(lambda x: moe.softmax_top_k(x, 1), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="kernels: got 2 experts; expected the 3 of routing"):
        jax.eval_shape(lambda x, r: moe.routed_experts(x, r, kernels), jnp.ones((4, 3)), routing)
