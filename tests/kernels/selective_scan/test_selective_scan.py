"""Properties of selective_scan alone: rates of every strength over many tokens; states never held whole."""

import jax
import jax.numpy as jnp
import pytest

import frugax
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS, run, widened

from . import definition

ROW = OPERATIONS["selective_scan"]


def test_rates_of_every_strength_over_65536_tokens():
    """States that last for ever, and states gone within a token: nothing overflows, nothing small is lost."""
    arguments = ROW.arguments({"T": 65536, "D": 3, "N": 4, "B": 1, "strong": True})
    want = definition.selective_scan(**widened(arguments))
    assert_close(run(ROW, arguments, "xla"), want, "float32")


@pytest.mark.parametrize("backend", ["xla", None])
def test_states_are_never_whole_in_memory(backend):
    """Temporaries of value and gradient, in units of x: no more for 4 times the tokens, and far below N."""
    D, N = 64, 16

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, D), jnp.float32)
        rows = jax.ShapeDtypeStruct((1, T, N), jnp.float32)
        A = jax.ShapeDtypeStruct((D, N), jnp.float32)

        def loss(x, dt, A, B, C, z):
            y, _ = frugax.kernels.selective_scan(x, dt, A, B, C, z=z, dt_softplus=True, backend=backend)
            return jnp.sum(y**2)

        compiled = (
            jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4, 5))).lower(x, x, A, rows, rows, x).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes / (T * D * 4)

    long = temporaries(8192)
    assert long < N * 3 / 4
    assert long <= 1.05 * temporaries(2048)
