"""Every backend of selective_scan against its equation: values, gradients, states, packing, sizes, dtypes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.cases import served
from tests.errors import assert_close

from . import definition
from .cases import Case, cotangents, in_float64, split, value_and_gradients, widen

CASES = [
    Case(T=1, D=1, N=1, B=1, state=True),
    Case(T=1, D=130, whole=True, state=True),
    Case(T=7, D=1, N=4, whole=True, packed=True),
    Case(T=33, N=1, whole=True, state=True, packed=True, strong=True),
    Case(T=100, D=20, N=4),
    Case(T=67, D=130, N=16, B=1, whole=True, state=True, packed=True),
    Case(T=67, D=20, N=64, B=1, whole=True, strong=True),
    Case(T=50, D=20, N=8, state=True, packed=True, dtype="bfloat16"),
    Case(T=50, D=130, N=16, whole=True, state=True, dtype="bfloat16"),
]
# Interpreted kernels take seconds to compile: each way through them once.
ON_TPU = [
    CASES[2],
    Case(T=150, D=130, B=1, whole=True, state=True, packed=True, strong=True),  # two blocks each way
    Case(T=50, D=20, N=20, B=1, state=True, dtype="bfloat16"),
]
ON_GPU = [
    Case(T=20, D=130, N=3, B=1, whole=True, state=True, packed=True),  # tiles of 16 tokens, then of 8
    Case(T=11, D=20, N=4, B=2, dtype="bfloat16"),
]
# None is `xla` on CPU, with the gradient by hand.
SERVED = {"xla": CASES, None: CASES, "pallas_tpu": ON_TPU, "pallas_gpu": ON_GPU}


@pytest.mark.parametrize("case", [replace(c, dtype="float64") for c in CASES[2:7]], ids=str)
def test_reference_is_the_definition(case):
    """Values, and the slope along a random direction of every argument, by complex steps."""
    arguments = case.arguments()
    with jax.enable_x64(True):
        (y, state), gradients = jax.tree.map(np.asarray, value_and_gradients(arguments, "reference"))
    rows = [definition.selective_scan(**definition.row(arguments, b)) for b in range(case.B)]
    want = tuple(np.stack(x) for x in zip(*rows, strict=True))
    assert_close((y, state), want, "float64")
    rng = np.random.default_rng(1)
    directions = {n: rng.standard_normal(arguments[n].shape) for n in gradients}
    slopes = definition.slopes(*cotangents(arguments), arguments, directions)
    for name, gradient in gradients.items():
        size = np.linalg.norm(gradient)  # a slope may be small by chance; the gradient's length is its scale
        assert abs(np.vdot(gradient, directions[name]) - slopes[name]) <= 1e-11 * size, name


@pytest.mark.parametrize(
    ("backend", "case"),
    served(SERVED),
)
def test_values_and_gradients(backend, case):
    arguments = case.arguments()
    (y, state), gradients = value_and_gradients(arguments, backend)
    assert y.dtype == case.dtype
    assert state.dtype == jnp.float32
    assert {n: g.dtype for n, g in gradients.items()} == {n: arguments[n].dtype for n in gradients}
    (want_y, want_state), want_gradients = in_float64(arguments)
    assert_close(y, want_y, y.dtype, name="y")
    assert_close(state, want_state, "float32", name="state")  # float32 even where y is bfloat16
    for name, gradient in gradients.items():
        assert_close(gradient, want_gradients[name], case.dtype, name=f"d{name}")


def test_float64_stays_float64():
    arguments = Case(T=40, whole=True, state=True, packed=True, dtype="float64").arguments()
    with jax.enable_x64(True):
        got = jax.tree.map(np.asarray, value_and_gradients(arguments, "xla"))
    assert_close(got, in_float64(arguments), "float64")


BACKENDS = ["xla", "pallas_tpu"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_equals_whole_and_packed_equals_separate(backend):
    floats, rest = split(Case(T=50, D=20, B=1, whole=True, state=True).arguments())

    def call(tokens, **change):
        cut = {n: floats[n][:, tokens] for n in ("x", "dt", "B", "C", "z")}
        return frugax.kernels.selective_scan(**{**floats, **rest, **cut, **change}, backend=backend)

    whole = call(slice(None))
    first, between = call(slice(0, 19))
    second, last = call(slice(19, 50), initial_state=between)
    assert_close((jnp.concatenate([first, second], 1), last), whole, "float32")
    fresh, fresh_last = call(slice(19, 50), initial_state=None)
    packed = call(slice(None), segment_ids=jnp.asarray(np.arange(50) >= 19, jnp.int32)[None])
    assert_close(packed, (jnp.concatenate([first, fresh], 1), fresh_last), "float32")


def test_one_token_at_a_time_equals_whole():
    """Decoding is the same call with T = 1."""
    floats, rest = split(Case(T=9, D=20, B=2, whole=True, state=True).arguments())
    whole = frugax.kernels.selective_scan(**floats, **rest)
    step = jax.jit(lambda **floats: frugax.kernels.selective_scan(**floats, **rest))
    state, rows = floats.pop("initial_state"), []
    for t in range(9):
        token = {n: floats[n][:, t : t + 1] for n in ("x", "dt", "B", "C", "z")}
        y, state = step(**{**floats, **token}, initial_state=state)
        rows.append(y)
    assert_close((jnp.concatenate(rows, 1), state), whole, "float32")


@pytest.mark.parametrize("backend", ["reference", "xla", None])
def test_no_gradient_crosses_a_boundary(backend):
    """What one document's outputs say about another's inputs is exactly nothing."""
    floats, rest = split(Case(T=20, D=8, B=1, whole=True, state=True).arguments())
    ids = jnp.asarray((np.arange(20) >= 13)[None].astype(np.int32))

    def second_document(floats):
        y, state = frugax.kernels.selective_scan(**floats, **rest, segment_ids=ids, backend=backend)
        return jnp.sum(y[:, 13:] ** 2) + jnp.sum(state)

    gradient = jax.grad(second_document)(floats)
    assert not gradient["initial_state"].any()
    for name in ("x", "dt", "B", "C", "z"):
        assert not gradient[name][:, :13].any(), name
        assert gradient[name][:, 13:].all(), name


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_equals_a_loop(backend):
    floats, rest = split(Case(T=5, D=24, whole=True, state=True).arguments())
    mapped = ("x", "dt", "B", "C", "z", "initial_state")
    one = {n: x for n, x in floats.items() if n not in mapped}

    def loss(two):
        y, state = frugax.kernels.selective_scan(**one, **two, **rest, backend=backend)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state**2)

    stacked = {n: jnp.stack([floats[n], floats[n][::-1]]) for n in mapped}
    got = jax.vmap(jax.value_and_grad(loss))(stacked)
    want = [jax.value_and_grad(loss)({n: x[i] for n, x in stacked.items()}) for i in range(2)]
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), "float32")


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_forward_mode_and_second_derivatives(backend):
    """Slopes and curvatures along a direction: forward and reverse mode agree with float64's."""
    arguments = Case(T=40, D=4, N=4, B=1, whole=True, state=True, packed=True).arguments()

    def measure(dtype, backend):
        floats, rest = split(arguments)
        a = {n: jnp.asarray(x, dtype) for n, x in floats.items()}
        rng = np.random.default_rng(3)
        left, right = (
            {n: jnp.asarray(rng.standard_normal(x.shape), dtype) for n, x in a.items()} for _ in "lr"
        )

        def loss(a):
            y, state = frugax.kernels.selective_scan(**a, **rest, backend=backend)
            return jnp.sum(jnp.sin(y)) + jnp.sum(state**2)

        def dot(x, y):
            return sum(jnp.vdot(x[n], y[n]) for n in x)

        slope, forward_over_forward = jax.jvp(lambda a: jax.jvp(loss, (a,), (left,))[1], (a,), (right,))
        gradient, change = jax.jvp(jax.grad(loss), (a,), (right,))
        return [slope, dot(gradient, left)], [forward_over_forward, dot(change, left)]

    with jax.enable_x64(True):
        slopes, curvatures = measure(jnp.float64, "reference")
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-12)
    np.testing.assert_allclose(curvatures, curvatures[0], rtol=1e-12)
    # A sum of signed terms can be smaller than they are: ten times is room for that.
    assert_close(measure(jnp.float32, backend), (slopes, curvatures), "float32", times=10)


def test_rates_of_every_strength_over_65536_tokens():
    """States that last for ever, and states gone within a token: nothing overflows, nothing small is lost."""
    arguments = Case(T=65536, D=3, N=4, B=1, strong=True).arguments()
    y, state = frugax.kernels.selective_scan(**split(arguments)[0], backend="xla")
    want = definition.selective_scan(**definition.row(widen(arguments), 0))
    assert_close((y[0], state[0]), want, "float32")


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
