"""The nearest orthogonal matrix, by both orders of the products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.optim.common.newton_schulz import newton_schulz
from tests.errors import assert_close


def defined(x, steps):
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def of_spectrum(shape, values):
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    return u * values @ vt


@pytest.mark.parametrize("n", [9, 40])  # squarish matrices are multiplied at each step, wide ones once
def test_stacks_are_the_definition(n):
    x = np.stack([of_spectrum((7, n), np.geomspace(1, low, 7)) for low in (0.5, 1e-4)])
    got = jax.jit(newton_schulz)(jnp.asarray(x, jnp.float32))
    # Where x is multiplied once, errors of its Gram matrix grow by 3.4445^2 in all steps but one.
    times = 1 if n == 9 else 3.4445**8 / 64
    assert_close(got, np.stack([defined(part, 5) for part in x]), "float32", times=times)
    values = np.linalg.svd(np.asarray(got[0]), compute_uv=False)
    assert (values > 0.65).all()
    assert (values < 1.25).all()
    one = jax.jit(newton_schulz, static_argnums=1)(jnp.asarray(x[1], jnp.float32), 1)
    assert_close(one, defined(x[1], 1), "float32")


def test_zeros_stay_zeros():
    assert not newton_schulz(jnp.zeros((2, 9))).any()
