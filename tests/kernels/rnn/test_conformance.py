"""Every backend of rnn against float64: values, gradients, states, packing, odd sizes, half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.kernels.rnn.cells import CELLS as CELL_DEFINITIONS
from tests.cases import served
from tests.errors import assert_close

from . import definition
from .cases import FLOATS, Case, cotangents, split, value_and_gradients, wide

CELLS = tuple(definition.CELLS)
CASES = [
    *(Case(cell, B=2, T=9, H=3, D=7, state=True, packed=True) for cell in CELLS),
    Case("lstm", B=3, T=1, H=1, D=5, state=True),
    Case("gru", B=1, T=40, H=2, D=33, bias=False),
    Case("elman", B=9, T=12, H=1, D=1),
    Case("slstm", B=1, T=40, H=1, D=20, bias=False),
    *(Case(c, B=3, T=12, H=2, D=24, state=True, packed=True, dtype="bfloat16") for c in ("gru", "slstm")),
]
# Kernels pad to 128 channels and 8 or 16 sequences, and are interpreted slowly: few cases, each of odd sizes.
ON_TPU = [
    *(Case(cell, B=3, T=5, H=2, D=7, state=True, packed=True) for cell in CELLS),
    Case("lstm", B=9, T=70, H=1, D=5, bias=False),  # two blocks of time
    *(Case(cell, B=2, T=5, H=1, D=130, state=True, dtype="bfloat16") for cell in ("lstm", "gru")),
    Case("gru", B=1, T=1, H=2, D=3, state=True, packed=True),
    Case("elman", B=1, T=1, H=1, D=3, state=True),  # as many tokens as heads
]
ON_GPU = [
    *(Case(cell, B=3, T=5, H=2, D=7, state=True, packed=True, dtype="bfloat16") for cell in CELLS),
    Case("lstm", B=18, T=4, H=1, D=70, dtype="bfloat16"),  # two blocks of sequences, two of channels
    Case("gru", B=1, T=1, H=2, D=3, state=True, dtype="bfloat16", bias=False),
]
SERVED = {"xla": CASES, "pallas_tpu": ON_TPU, "pallas_gpu": ON_GPU, None: CASES[:1]}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("packed", [False, True])
def test_reference_is_the_equations(cell, packed):
    """Values, and every entry of every gradient, against numpy and complex steps."""
    case = Case(cell, B=2, T=5, H=2, D=3, state=True, packed=packed, dtype="float64")
    arguments = case.arguments()
    with jax.enable_x64(True):
        got, gradient = value_and_gradients(case, arguments, "reference")
        dh, dstate = map(np.asarray, cotangents(*got))
    floats = {n: arguments[n] for n in FLOATS}
    ids = arguments.get("segment_ids")
    assert_close(got, definition.rnn(**floats, cell=cell, segment_ids=ids), "float64")
    want = definition.gradients(dh, dstate, cell, ids, **floats)
    assert_close(gradient, want, "float64", name="d")


@pytest.mark.parametrize(("backend", "case"), served(SERVED))
def test_values_and_gradients(backend, case):
    arguments = case.arguments()
    (h, state), gradients = value_and_gradients(case, arguments, backend)
    assert h.dtype == case.dtype
    assert state.dtype == jnp.float32
    assert {n: g.dtype for n, g in gradients.items()} == {n: arguments[n].dtype for n in gradients}
    with jax.enable_x64(True):
        (want_h, want_state), want = jax.tree.map(
            np.asarray, value_and_gradients(case, wide(arguments), "reference")
        )
    assert_close(h, want_h, case.dtype, name="h")
    assert_close(state, want_state, case.dtype, name="state")
    assert_close(gradients, want, case.dtype, name="d")


@pytest.mark.parametrize("cell", CELLS)
def test_pullbacks_are_the_steps_derivatives(cell):
    """By hand in the kernels, by JAX here; the sLSTM before its first token, too."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        definition = CELL_DEFINITIONS[cell]
        pre, reads, dstates = (
            tuple(jnp.asarray(rng.standard_normal((n, 9))))
            for n in (definition.pre_activations, len(definition.reads), len(definition.states))
        )
        if cell == "slstm":
            reads = reads[0], (1 + jnp.abs(reads[1])).at[0].set(0), reads[2]
        _, pullback = jax.vjp(definition.step, pre, reads)
        assert_close(definition.pullback(pre, reads, dstates), pullback(dstates), "float64")


@pytest.mark.parametrize("cell", ["gru", "slstm"])
def test_xla_in_float64(cell):
    case = Case(cell, B=2, T=11, H=2, D=6, state=True, packed=True, dtype="float64")
    with jax.enable_x64(True):
        want = value_and_gradients(case, case.arguments(), "reference")
        assert_close(value_and_gradients(case, case.arguments(), "xla"), want, "float64")


@pytest.mark.parametrize(("backend", "cell"), [("xla", "gru"), ("xla", "slstm")])
def test_forward_mode_and_second_derivatives(backend, cell):
    """jvp equals vjp; a Hessian's form is the same by every order of modes, and by finite differences."""
    case = Case(cell, B=1, T=6, H=1, D=3, state=True, packed=True, dtype="float64")
    with jax.enable_x64(True):
        x, rest = split(case.arguments())
        rng = np.random.default_rng(3)
        left, right = ({n: jnp.asarray(rng.standard_normal(a.shape)) for n, a in x.items()} for _ in "lr")

        def loss(x):
            h, state = frugax.kernels.rnn(**x, **rest, cell=cell, backend=backend)
            return jnp.sum(jnp.sin(h)) + jnp.sum(state**2)

        def dot(a, b):
            return sum(jnp.vdot(a[n], b[n]) for n in a)

        def along(direction):
            return lambda x: jax.jvp(loss, (x,), (direction,))[1]

        def both(x):
            gradient, forward_over_reverse = jax.jvp(jax.grad(loss), (x,), (right,))
            return {
                "slopes": (along(left)(x), dot(gradient, left)),
                "curvatures": (
                    jax.jvp(along(left), (x,), (right,))[1],
                    dot(jax.grad(along(left))(x), right),
                    dot(forward_over_reverse, left),
                    dot(jax.grad(lambda x: dot(jax.grad(loss)(x), left))(x), right),
                ),
            }

        got = jax.jit(both)(x)
        e = 1e-5
        moved = [jax.tree.map(lambda a, d, e=e: a + e * d, x, right) for e in (e, -e)]
        up, down = (along(left)(x) for x in moved)
    np.testing.assert_allclose(got["slopes"], got["slopes"][0], rtol=1e-10)
    np.testing.assert_allclose(got["curvatures"], got["curvatures"][0], rtol=1e-10)
    np.testing.assert_allclose(got["curvatures"][0], (float(up) - float(down)) / (2 * e), rtol=1e-6)
