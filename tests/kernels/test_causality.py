"""No output depends on what comes after it: the same bits, whatever stands there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax

from .harness import OPERATIONS, over, parts, run


def has_time(row) -> bool:
    return any(axes.startswith("b t") for axes in row.axes.values())


def tokens_of(row, arguments: dict) -> list[str]:
    """Return the names of the float arrays [batch, time, ...] among the arguments."""
    arrays = {n: x for n, x in parts(arguments)[0].items() if isinstance(x, np.ndarray)}
    return [n for n in arrays if row.axes_of(n, arguments).startswith("b t")]


def causal() -> list:
    """Return (operation, backend): by default what runs on a CPU. A convolution by FFT rounds all at once."""
    return [
        pytest.param(name, backend, marks=[] if backend in (None, "chunks") else pytest.mark.full)
        for name in over(has_time)
        for backend in OPERATIONS[name].cases
        if backend != "fft"
    ]


@pytest.mark.parametrize(("operation", "backend"), causal())
def test_outputs_are_the_same_bits_whatever_comes_later(operation, backend):
    """Later tokens are made large, change their signs where they may, and begin other documents."""
    row = OPERATIONS[operation]
    arguments = row.arguments(row.small_on(backend))
    arguments |= {"reverse": False} if "reverse" in arguments else {}
    if backend == "chunks":
        arguments.pop("segment_ids", None)
    tokens = tokens_of(row, arguments)
    signed = {"x", "q", "k", "v", "b", "a", "B", "C", "z", "u", "gates"}
    whole = np.asarray(run(row, arguments, backend)[0])
    T = whole.shape[1]
    for cut in (1, T // 2, T - 1):
        changed = dict(arguments)
        for name in tokens:
            x = np.array(arguments[name])
            x[:, cut:] = (x[:, cut:].astype(np.float64) * (-300 if name in signed else 3)).astype(x.dtype)
            changed[name] = x
        if "segment_ids" in arguments:
            changed["segment_ids"] = np.array(arguments["segment_ids"])
            changed["segment_ids"][:, cut:] += np.arange(T - cut, dtype=np.int32) % 2
        out = np.asarray(run(row, changed, backend)[0])
        assert (out[:, :cut] == whole[:, :cut]).all(), f"token {cut} and later ones change earlier outputs"
        assert (out[:, cut:] != whole[:, cut:]).any()


def test_a_step_of_mamba_3_reads_no_later_one():
    one, rates = jnp.ones((1, 2, 1, 1), jnp.bfloat16), -jnp.ones((1, 2, 1))
    mix = jnp.full((1, 2, 1), 0.1)
    for later in (0.1, 10.0):
        dt = jnp.array([[[0.001], [later]]])
        y, _ = jax.jit(frugax.kernels.trapezoidal_ssd)(one, dt, rates, one, one, mix)
        assert float(y[0, 0, 0, 0]) == pytest.approx(1e-4, rel=2**-8)
