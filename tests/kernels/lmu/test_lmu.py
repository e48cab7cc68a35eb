"""Properties of the Legendre delay system: it is linear, and a delay; platforms take different forms."""

import jax
import numpy as np
from numpy.polynomial import legendre

import frugax
from tests.kernels.harness import OPERATIONS


def test_platforms_take_the_form_that_is_fast_on_them():
    """One program, exported: a loop over tokens for CPU, chunks of them for TPU; and it has a gradient."""
    arguments = OPERATIONS["lmu"].arguments({"T": 45, "state": True})

    def f(u, m0):
        return frugax.kernels.lmu(u, arguments["order"], arguments["theta"], initial_state=m0)[0].sum()

    for platform, products in (("cpu", False), ("tpu", True)):
        text = jax.export.export(jax.jit(jax.grad(f)), platforms=[platform])(
            arguments["u"], arguments["initial_state"]
        ).mlir_module()
        assert ("2x2x32x3x" in text) == products  # two chunks of 32 tokens


def test_the_memory_is_the_window_and_better_so_with_order():
    """u(t - s) = sum_n P_n((2 s + 1) / theta - 1) m_n, for signals slow enough for the order."""
    theta, t = 60.0, np.arange(400)
    u = np.sin(2 * np.pi * t / 47) + 0.5 * np.cos(2 * np.pi * t / 90)
    back = np.arange(5, 60, 5)
    want = np.stack([u[200 - s : 400 - s] for s in back], axis=1)
    errors = []
    for order in (4, 8, 12):
        remember = jax.jit(lambda u, order=order: frugax.kernels.lmu(u, order, theta)[0])
        m = np.asarray(remember(u.astype(np.float32)[None, :, None]), np.float64)
        read = legendre.legval((2 * back + 1) / theta - 1, m[0, 200:, 0].T)
        errors.append(np.sqrt(np.mean((read - want) ** 2) / np.mean(want**2)))
    assert errors[0] > 10 * errors[1] > 50 * errors[2]
    # What stays is the hold: the mean of a sine over one token is less than its middle by omega^2 / 24.
    assert errors[2] < 1.5 * (2 * np.pi / 47) ** 2 / 24
