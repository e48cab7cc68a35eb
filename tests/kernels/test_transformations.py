"""Every operation under `vmap`, in forward mode and twice differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import assert_close

from .harness import OPERATIONS, narrowest, over, parts, program, value_and_gradients

DIFFERENTIABLE = over(lambda row: row.check is None)


def mapped() -> list:
    """Return (operation, backend): by default what runs on a CPU."""
    return [
        pytest.param(name, backend, marks=pytest.mark.full if backend or OPERATIONS[name].composed else [])
        for name in DIFFERENTIABLE
        for backend in OPERATIONS[name].cases
    ]


@pytest.mark.parametrize(("operation", "backend"), mapped())
def test_vmap_equals_a_loop(operation, backend):
    """Values and gradients of two calls at once."""
    row = OPERATIONS[operation]
    arguments = row.arguments(row.small_on(backend))
    floats, arrays, static = parts(arguments)
    run = program(row, backend, static)
    # jax 0.10's GPU interpreter has effects, which a vmapped and jitted choice of platform can't have.
    if backend == "pallas_gpu":
        run, arrays = run.__wrapped__, jax.tree.map(jnp.asarray, arrays)
    other = jax.tree.map(lambda x: x[::-1], floats)
    stacked = jax.tree.map(lambda *x: np.stack(x), floats, other)
    mapped = jax.vmap(run, in_axes=(0, None, None))
    mapped = mapped if backend == "pallas_gpu" else jax.jit(mapped)
    got = mapped(stacked, arrays, None)
    want = [value_and_gradients(row, arguments | each, backend) for each in (floats, other)]
    assert_close(got, jax.tree.map(lambda *x: np.stack(x), *want), narrowest(arguments))


def twice() -> list:
    """Return (operation, backend) of the backends that JAX differentiates."""
    return [
        pytest.param(name, backend, marks=[] if backend == "xla" and not row.composed else pytest.mark.full)
        for name in DIFFERENTIABLE
        for row in [OPERATIONS[name]]
        for backend in row.twice
    ]


@pytest.mark.parametrize(("operation", "backend"), twice())
def test_forward_mode_and_second_derivatives(operation, backend):
    """jvp equals vjp, curvatures are the same in every order of modes, and both are finite differences."""
    row = OPERATIONS[operation]
    arguments = row.arguments(row.small_on(backend) | {"dtype": "float64"})
    floats, arrays, static = parts(arguments)
    arrays = jax.tree.map(jnp.asarray, arrays)
    rng = np.random.default_rng(3)
    left, right = (jax.tree.map(lambda x: rng.standard_normal(x.shape), floats) for _ in "lr")

    def loss(floats):
        results = row.call(backend, **floats, **arrays, **static)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(results))

    def dot(x, y):
        return sum(map(jnp.vdot, jax.tree.leaves(x), jax.tree.leaves(y)))

    def along(x):
        return jax.jvp(loss, (x,), (left,))[1]

    @jax.jit
    def measure(x):
        slope, curvature = jax.jvp(along, (x,), (right,))
        gradient, change = jax.jvp(jax.grad(loss), (x,), (right,))
        return {
            "value": loss(x),
            "slopes": jnp.stack([slope, dot(gradient, left)]),
            "curvatures": jnp.stack([curvature, dot(change, left), dot(jax.grad(along)(x), right)]),
        }

    with jax.enable_x64(True):
        got = measure(floats)
        e = 1e-5
        moved = lambda way, e: measure(jax.tree.map(lambda x, d: x + e * d, floats, way))  # noqa: E731
        slope = (moved(left, e)["value"] - moved(left, -e)["value"]) / (2 * e)
        curvature = (moved(right, e)["slopes"][0] - moved(right, -e)["slopes"][0]) / (2 * e)
    np.testing.assert_allclose(got["slopes"], got["slopes"][0], rtol=1e-10)
    np.testing.assert_allclose(got["curvatures"], got["curvatures"][0], rtol=1e-10)
    # The third derivative times e^2, and rounding over e.
    np.testing.assert_allclose(got["slopes"][0], slope, rtol=1e-6)
    np.testing.assert_allclose(got["curvatures"][0], curvature, rtol=1e-6)
