"""Every backend of causal_conv1d, held to its float64 definition."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.kernels.causal_conv1d import pallas_gpu, pallas_tpu
from frugax.kernels.causal_conv1d.inputs import Inputs
from frugax.kernels.causal_conv1d.tiling import TPUTiling
from frugax.kernels.common.operation import BACKENDS
from tests.cases import served
from tests.errors import assert_close
from tests.seeds import generator

from . import definition

causal_conv1d = frugax.kernels.causal_conv1d


class Case(NamedTuple):
    T: int
    D: int
    W: int
    bias: bool = True
    activation: str | None = "silu"
    state: bool = False
    packed: bool = False


CASES = [
    Case(1, 60, 4, state=True),
    Case(2, 200, 5, state=True, packed=True),
    Case(7, 1, 2, bias=False, state=True),
    Case(65, 60, 1, packed=True),
    Case(65, 200, 4, state=True),
    Case(130, 60, 4, state=True, packed=True),
    Case(130, 200, 5, bias=False, activation=None, packed=True),
    Case(7, 60, 5, activation=None),
    Case(130, 1, 4),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def draw(case: Case, dtype=np.float32, seed: int = 0, B: int = 2):
    """Arguments rounded to `dtype` (as float64 numpy), and cotangents."""
    rng = generator(seed)

    def normal(*shape):
        return np.asarray(jnp.asarray(rng.standard_normal(shape), dtype), np.float64)

    T, D, W = case.T, case.D, case.W
    segment_ids = None
    if case.packed:  # documents of 1..8 tokens, and ids that come back
        segment_ids = np.stack(
            [np.repeat(rng.integers(0, 3, T), rng.integers(1, 9, T))[:T] for _ in range(B)]
        )
        segment_ids[0, : T // 2] = 1  # one long enough to cross a block of any kernel
    bias = normal(D) if case.bias else None
    state = normal(B, W - 1, D) if case.state else None
    args = (normal(B, T, D), normal(W, D), bias, state)
    return args, segment_ids, (normal(B, T, D), normal(B, W - 1, D))


def cast(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def call(args, case, segment_ids, backend):
    x, weight, bias, state = args
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    return causal_conv1d(
        x,
        weight,
        bias,
        activation=case.activation,
        initial_state=state,
        segment_ids=segment_ids,
        backend=backend,
    )


def value_and_gradients(case, args, segment_ids, cotangents, backend):
    @jax.jit
    def run(args, cotangents):
        out, vjp = jax.vjp(lambda a: call(a, case, segment_ids, backend), args)
        return out, vjp(cotangents)[0]

    return run(args, cotangents)


def check_against_definition(case, dtype, backend):
    args, segment_ids, cotangents = draw(case, dtype)
    out, grads = value_and_gradients(case, cast(args, dtype), segment_ids, cast(cotangents, dtype), backend)
    x, weight, bias, state = args
    want = definition.convolve(
        x, weight, bias, activation=case.activation, initial_state=state, segment_ids=segment_ids
    )
    want_grads = definition.gradients(x, weight, bias, case.activation, state, segment_ids, *cotangents)
    want_grads = tuple(None if a is None else g for a, g in zip(args, want_grads, strict=True))
    assert all(a.dtype == dtype for a in jax.tree.leaves((out, grads)))
    if case.W == 1:  # the state is empty
        assert out[1].shape == want[1].shape
        out, want = out[0], want[0]
    assert_close(out, want, dtype, name="out")
    assert_close(grads, want_grads, dtype, name="gradient")


@pytest.mark.parametrize(("backend", "case"), served(dict.fromkeys(BACKENDS, CASES)))
def test_forward_and_every_gradient(backend, case):
    check_against_definition(case, jnp.float32, backend)


@pytest.mark.parametrize("case", [CASES[5]], ids=str)
def test_bfloat16(case, backend):
    check_against_definition(case, jnp.bfloat16, backend)


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=str)
def test_float64(case, backend):
    with jax.enable_x64(True):
        check_against_definition(case, jnp.float64, backend)


@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_gpu"])
def test_kernels_refuse_float64_by_name_and_fall_back_otherwise(backend):
    with jax.enable_x64(True):
        x, weight = jnp.ones((1, 8, 128)), jnp.ones((4, 128))
        with pytest.raises(ValueError, match="float64"):
            causal_conv1d(x, weight, backend=backend)
        assert causal_conv1d(x, weight)[0].dtype == jnp.float64


def test_blocks_of_a_tpu_sequence(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "for_tpu", lambda call, **_: TPUTiling(time=32, channels=128))
    case = Case(130, 200, 5, state=True, packed=True)
    check_against_definition(case, jnp.float32, "pallas_tpu")


def test_the_definitions_own_gradient_by_complex_steps():
    case = Case(7, 3, 4, state=True, packed=True)
    args, segment_ids, cotangents = draw(case)
    x, weight, bias, state = args
    grads = definition.gradients(x, weight, bias, "silu", state, segment_ids, *cotangents)
    directions, _, _ = draw(case, seed=1)
    for i in range(4):
        a = [
            arg + 1e-30j * d if i == j else arg
            for j, (arg, d) in enumerate(zip(args, directions, strict=True))
        ]
        out = definition.convolve(
            a[0], a[1], a[2], activation="silu", initial_state=a[3], segment_ids=segment_ids
        )
        slope = sum(np.sum(o.imag * c) for o, c in zip(out, cotangents, strict=True)) / 1e-30
        np.testing.assert_allclose(slope, np.sum(grads[i] * directions[i]), rtol=1e-12)


def test_weights_may_have_another_dtype_than_x(backend):
    case = Case(65, 60, 4, state=True)
    args, _, cotangents = draw(case, jnp.bfloat16)
    x, weight, bias, state = args
    mixed = (jnp.asarray(x, jnp.bfloat16), *cast((weight, bias, state), jnp.float32))
    out, grads = value_and_gradients(case, mixed, None, cast(cotangents, jnp.bfloat16), backend)
    assert [a.dtype for a in out] == [jnp.bfloat16] * 2
    assert [g.dtype for g in grads] == [a.dtype for a in mixed]
    want = definition.convolve(x, weight, bias, activation="silu", initial_state=state)
    assert_close(out, want, jnp.bfloat16)
    assert_close(grads, definition.gradients(x, weight, bias, "silu", state, None, *cotangents), jnp.bfloat16)


def test_split_and_carried_is_whole(backend):
    case = Case(65, 60, 4, state=True, packed=True)
    args, ids, _ = draw(case)
    x, weight, bias, state = cast(args, jnp.float32)
    run = jax.jit(lambda x, state, ids: call((x, weight, bias, state), case, ids, backend))
    whole = run(x, state, ids)
    ys = []
    for lo, hi in ((0, 2), (2, 33), (33, 65)):
        if lo and (ids[:, lo] != ids[:, lo - 1]).any():  # a row whose document ends here starts afresh
            state = jnp.where((ids[:, lo] != ids[:, lo - 1])[:, None, None], 0, state)
        y, state = run(x[:, lo:hi], state, ids[:, lo:hi])
        ys.append(y)
    assert_close((jnp.concatenate(ys, 1), state), whole, jnp.float32)


def test_token_by_token_is_whole(backend):
    case = Case(7, 60, 4, state=True)
    args, _, _ = draw(case)
    x, weight, bias, state = cast(args, jnp.float32)
    want, _ = definition.convolve(*args[:3], activation="silu", initial_state=args[3])
    step = jax.jit(lambda x, state: call((x, weight, bias, state), case, None, backend))
    ys = []
    for t in range(case.T):
        y, state = step(x[:, t : t + 1], state)
        ys.append(y)
    assert_close(jnp.concatenate(ys, 1), want, jnp.float32)
    assert_close(state, args[0][:, -3:], jnp.float32)


def test_packed_is_separate(backend):
    case = Case(65, 60, 4)
    args, _, _ = draw(case, B=1)
    x, weight, bias, _ = cast(args, jnp.float32)
    lengths = [1, 2, 40, 22]
    ids = np.repeat([5, 0, 7, 5], lengths)[None]
    run = jax.jit(lambda x, ids: call((x, weight, bias, None), case, ids, backend))
    packed, state = run(x, ids)
    separate = [run(x[:, end - n : end], None) for n, end in zip(lengths, np.cumsum(lengths), strict=True)]
    assert_close(packed, jnp.concatenate([y for y, _ in separate], 1), jnp.float32)
    assert_close(state, separate[-1][1], jnp.float32)


def test_another_documents_nan_stays_there(backend):
    x = jnp.ones((1, 10, 8)).at[:, :5].set(jnp.nan)
    ids = jnp.repeat(jnp.arange(2), 5)[None]
    y, state = causal_conv1d(x, jnp.ones((4, 8)), segment_ids=ids, backend=backend)
    np.testing.assert_array_equal(y[0, 5:, 0], [1, 2, 3, 4, 4])
    np.testing.assert_array_equal(state, np.ones((1, 3, 8)))


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_vmap(backend):
    case = Case(7, 60, 4, state=True)
    draws = [draw(case, seed=s)[0] for s in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.asarray(np.stack(a), jnp.float32), *draws)

    @jax.jit
    def loss_and_gradient(args):
        return jax.value_and_grad(lambda a: jnp.sum(call(a, case, None, backend)[0] ** 2))(args)

    got = jax.vmap(loss_and_gradient)(stacked)
    each = [loss_and_gradient(cast(args, jnp.float32)) for args in draws]
    assert_close(got, jax.tree.map(lambda *a: jnp.stack(a), *each), jnp.float32)


def test_vmap_of_the_gpu_kernels():
    """Themselves: the choice between compiled and interpreted has no vmap, as interpreting has effects."""
    case = Case(7, 60, 4, state=True)
    draws = [draw(case, seed=s) for s in range(2)]
    forward, backward = (partial(f, interpret=True) for f in (pallas_gpu.forward, pallas_gpu.backward))

    def run(args, dy):
        inputs = Inputs(*args, None)
        return forward(inputs, "silu"), backward(inputs, dy, "silu")

    stacked = [(*args, cotangents[0]) for args, _, cotangents in draws]
    *args, dy = (jnp.asarray(np.stack(a), jnp.float32) for a in zip(*stacked, strict=True))
    y, grads = jax.vmap(run)(tuple(args), dy)
    for i, (args, _, cotangents) in enumerate(draws):
        want, _ = definition.convolve(*args[:3], activation="silu", initial_state=args[3])
        no_state = np.zeros_like(cotangents[1])
        want_grads = definition.gradients(*args[:3], "silu", args[3], None, cotangents[0], no_state)
        assert_close(y[i], want, jnp.float32)
        assert_close(tuple(g[i] for g in grads[:4]), want_grads, jnp.float32)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_jvp_and_second_derivative(backend):
    case = Case(7, 5, 4, state=True, packed=True)
    with jax.enable_x64(True):
        args, ids, cotangents = draw(case)
        directions, _, _ = draw(case, seed=1)

        def f(a):
            return call(a, case, ids, backend)

        _, tangents = jax.jvp(f, (args,), (directions,))
        x, weight, bias, state = (a + 1e-30j * d for a, d in zip(args, directions, strict=True))
        want = definition.convolve(x, weight, bias, activation="silu", initial_state=state, segment_ids=ids)
        assert_close(tangents, tuple(o.imag / 1e-30 for o in want), jnp.float64)

        def gradient(a):
            return jax.vjp(f, a)[1](tuple(map(jnp.asarray, cotangents)))[0]

        _, second = jax.jvp(gradient, (args,), (directions,))
        plus, minus = (
            definition.gradients(
                *(a + h * d for a, d in zip(args[:3], directions[:3], strict=True)),
                "silu",
                args[3] + h * directions[3],
                ids,
                *cotangents,
            )
            for h in (1e-6, -1e-6)
        )
        central = tuple((p - m) / 2e-6 for p, m in zip(plus, minus, strict=True))
        # central differences: h^2 of truncation (1e-12) and eps / h of rounding (2e-10), not float64's bound
        for a, e in zip(second, central, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x", dict(x=jnp.ones((2, 8)))),
        ("x", dict(x=jnp.ones((2, 0, 6)))),
        ("x", dict(x=jnp.ones((2, 8, 6), int))),
        ("weight", dict(weight=jnp.ones((4, 5)))),
        ("weight", dict(weight=jnp.ones((0, 6)))),
        ("weight", dict(weight=jnp.ones((4, 6), int))),
        ("bias", dict(bias=jnp.ones(5))),
        ("bias", dict(bias=jnp.ones(6, int))),
        ("initial_state", dict(initial_state=jnp.ones((2, 4, 6)))),
        ("initial_state", dict(initial_state=jnp.ones((2, 3, 6), int))),
        ("segment_ids", dict(segment_ids=jnp.ones((2, 7), int))),
        ("segment_ids", dict(segment_ids=jnp.ones((2, 8)))),
        ("activation", dict(activation="relu")),
        ("backend", dict(backend="triton")),
    ],
)
def test_bad_input_names_the_argument(name, changes, unchecked_types):
    good = dict(x=jnp.ones((2, 8, 6)), weight=jnp.ones((4, 6)))
    causal_conv1d(**good)
    with pytest.raises(ValueError, match=rf"^{name}: got .* expected "):
        jax.eval_shape(lambda: causal_conv1d(**(good | changes)))


def test_swish_is_silu():
    x, weight = jnp.ones((1, 5, 3)), jnp.ones((2, 3))
    np.testing.assert_array_equal(
        causal_conv1d(x, weight, activation="swish")[0], causal_conv1d(x, weight, activation="silu")[0]
    )
