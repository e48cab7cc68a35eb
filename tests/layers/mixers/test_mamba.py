"""Mamba and Mamba-2 against their papers' equations in numpy, and what they start from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close

from .mixers import WIDTH, whole


def call(name):
    """(the parameters as numpy, x [B, T, D], the mixer's y) in float64."""
    return whole(name)[:3]


def grouped(name):
    """Run a test in the worker that compiles this mixer's call for test_mixers.py."""
    return pytest.mark.xdist_group(f"mixer {name}")


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def convolved(x, p):
    taps = p["weight"]
    padded = np.pad(x, ((0, 0), (len(taps) - 1, 0), (0, 0)))
    return p["bias"] + sum(w * padded[:, i : i + x.shape[1]] for i, w in enumerate(taps))


def rms_norm(x, epsilon):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)


@pytest.mark.parametrize(
    ("name", "rank", "E"),
    [
        pytest.param("Mamba", 2, 16, marks=grouped("Mamba")),
        pytest.param("Mamba-norms", 1, 12, marks=grouped("Mamba-norms")),
    ],
)
def test_mamba(name, rank, E):
    p, x, y = call(name)
    u, z = np.split(x @ p["in_gate"]["kernel"], [E], axis=-1)
    u = silu(convolved(u, p["conv"]))
    low, B, C = np.split(u @ p["dt_B_C"]["kernel"], [rank, rank + 3], axis=-1)
    if name == "Mamba-norms":
        low, B, C = (rms_norm(a, 1e-6) for a in (low, B, C))
    dt = softplus(low @ p["dt"]["kernel"] + p["dt_bias"])
    state, out = np.zeros((2, E, 3)), []
    for t in range(x.shape[1]):
        state = np.exp(dt[:, t, :, None] * -np.exp(p["A_log"])) * state
        state += (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        out.append(np.einsum("ben,bn->be", state, C[:, t]) + p["D"] * u[:, t])
    assert_close(y, (np.stack(out, axis=1) * silu(z)) @ p["out"]["kernel"], "float64")


@grouped("Mamba-constant")
def test_without_selection_it_is_one_convolution_for_all_inputs():
    p, x, y = call("Mamba-constant")
    E, time = 16, x.shape[1]
    u, z = np.split(x @ p["in_gate"]["kernel"], [E], axis=-1)
    u = silu(convolved(u, p["conv"]))
    dt = softplus(p["dt_bias"])
    decays = np.exp(dt[:, None] * -np.exp(p["A_log"]) * np.arange(time)[:, None, None])  # [T, E, N]
    impulse = dt * (decays @ (p["B"] * p["C"]))
    impulse[0] += p["D"]
    out = np.stack([[np.convolve(row[:, e], impulse[:, e])[:time] for e in range(E)] for row in u])
    assert_close(y, (np.moveaxis(out, 1, 2) * silu(z)) @ p["out"]["kernel"], "float64")


@grouped("Mamba2")
def test_mamba2():
    p, x, y = call("Mamba2")
    E, H, G, N = 16, 4, 2, 3
    z, uBC, dt = np.split(x @ p["gate_in_dt"]["kernel"], [E, 2 * E + 2 * G * N], axis=-1)
    u, B, C = np.split(silu(convolved(uBC, p["conv"])), [E, E + G * N], axis=-1)
    dt = softplus(dt + p["dt_bias"])
    u = u.reshape(*u.shape[:2], H, E // H)
    B, C = (np.repeat(a.reshape(*a.shape[:2], G, N), H // G, axis=2) for a in (B, C))
    state, out = np.zeros((2, H, N, E // H)), []
    for t in range(x.shape[1]):
        state = np.exp(dt[:, t] * -np.exp(p["A_log"]))[..., None, None] * state
        state += dt[:, t, :, None, None] * B[:, t, :, :, None] * u[:, t, :, None]
        out.append(np.einsum("bhn,bhnp->bhp", C[:, t], state) + p["D"][:, None] * u[:, t])
    gated = np.stack(out, axis=1).reshape(z.shape) * silu(z)
    normed = rms_norm(gated.reshape(*z.shape[:2], G, E // G), 1e-5).reshape(z.shape)
    assert_close(y, (normed * p["norm"]) @ p["out"]["kernel"], "float64")


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_steps_start_between_a_thousandth_and_a_tenth(name):
    heads = {"Mamba": {}, "Mamba2": {"heads": 256}}[name]
    module = getattr(frugax.layers, name)(state_size=4, **heads)
    p = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, 128)))["params"]
    dt = softplus(np.asarray(p["dt_bias"], np.float64))
    assert dt.shape == (256,)
    assert (dt > 0.00099).all()
    assert (dt < 0.101).all()
    assert abs(np.median(dt) / 0.01 - 1) < 0.4  # as many below a hundredth as above
    rates = np.exp(np.asarray(p["A_log"]))
    if name == "Mamba":
        assert_close(rates, np.broadcast_to(np.arange(1, 5), (256, 4)), "float32")
        kernel = np.asarray(p["dt"]["kernel"])
        assert kernel.shape == (8, 256)
        assert 0.95 * 8**-0.5 < np.abs(kernel).max() <= 8**-0.5
    else:
        assert rates.min() >= 1
        assert rates.max() <= 16
        assert 7.5 < rates.mean() < 9.5
    assert (np.asarray(p["D"]) == 1).all()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Mamba", {"state_size": 0}, "state_size: got 0"),
        ("Mamba", {"dt_rank": 0}, "dt_rank: got 0"),
        ("Mamba", {"expand": 1.3}, "expand: got 1.3; expected a number that makes a whole one >= 1"),
        ("Mamba", {"conv_width": 0}, "width: got 0"),
        ("Mamba2", {"heads": 4, "groups": 3}, "groups: got 3; expected a number >= 1 that divides heads = 4"),
        ("Mamba2", {"heads": 4, "state_size": 0}, "state_size: got 0"),
    ],
)
def test_attributes_that_cannot_be_right(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(frugax.layers, name)(**arguments).init(jax.random.key(0), jnp.ones((1, 2, WIDTH)))
