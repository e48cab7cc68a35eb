"""Every backend against the float64 definition: values, gradients, states, packing, sizes, strong gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import served
from tests.errors import assert_close, error

from .cases import Case, attend, expected, value_and_gradients

FEATURES = [
    Case(T=1, decay="bth", state=True),
    Case(T=7),
    Case(T=63, decay="h", state=True),
    Case(T=64, decay="bth", packed=True),
    Case(T=130, decay="bth", state=True, packed=True, heads=(4, 2, 2)),
    Case(T=100, decay="bth", heads=(1, 1, 4), scale=1.0),  # Mamba-2's groups
    Case(T=70, decay="bthk", state=True),
    Case(T=130, decay="bthk", state=True, packed=True, heads=(4, 2, 2)),
    Case(T=65, decay="bthk", bonus=True, state=True, packed=True),
    Case(T=40, decay="bth", bonus=True),
    Case(T=150, decay="bthk", mildest=-1e-4, strongest=-50),
    Case(T=150, decay="bth", mildest=-1e-4, strongest=-50, packed=True),
    Case(T=50, decay="h", mildest=-40, strongest=-50, state=True),
]


def sized(case: Case, **changes) -> Case:
    return Case(**{**case.__dict__, **changes})


# What each backend must serve: the features at sizes and dtypes of its own.
SERVED = {
    "xla": [sized(c, K=K, V=V) for c, (K, V) in zip(FEATURES, [(16, 24), (5, 1), (16, 8)] * 5, strict=False)]
    + [sized(FEATURES[5], dtype="bfloat16"), sized(FEATURES[7], dtype="bfloat16")],
    "pallas_tpu": [sized(c, K=K, V=V) for c, (K, V) in zip(FEATURES, [(16, 24), (128, 60)] * 7, strict=False)]
    + [sized(c, dtype="bfloat16") for c in FEATURES[3:9]],
    "pallas_gpu": [sized(c, K=64, V=64, B=1, dtype="bfloat16") for c in FEATURES],
}


@pytest.mark.parametrize(("backend", "case"), served(SERVED, has=Case.traits))
def test_values_and_gradients(backend, case):
    arguments = case.arguments()
    values, gradients = value_and_gradients(arguments, backend)
    want_values, want_gradients = expected(arguments)
    assert values["out"].dtype == case.dtype
    assert values["final_state"].dtype == jnp.float32
    assert {n: g.dtype for n, g in gradients.items()} == {n: arguments[n].dtype for n in gradients}
    assert_close(values, want_values, case.dtype)
    assert_close(gradients, want_gradients, case.dtype, name="d")


def numpy_definition(q, k, v, log_decay, bonus, initial_state, segment_ids, scale):
    """The equation once more, in plain loops that share nothing with the library."""
    B, T, H, _ = q.shape
    out, state = np.zeros(v.shape), initial_state.copy()
    for b in range(B):
        for h in range(H):
            S = state[b, h]
            for t in range(T):
                if t and segment_ids[b, t] != segment_ids[b, t - 1]:
                    S = np.zeros_like(S)
                kv = np.outer(k[b, t, h], v[b, t, h])
                decayed = np.exp(log_decay[b, t, h])[:, None] * S + kv
                read = decayed if bonus is None else S + bonus[h][:, None] * kv
                out[b, t, h] = scale * q[b, t, h] @ read
                S = decayed
            state[b, h] = S
    return out, state


@pytest.mark.parametrize("bonus", [False, True])
def test_reference_is_the_equation(bonus):
    a = Case(T=20, decay="bthk", state=True, packed=True, bonus=bonus, scale=0.3).arguments()
    a = {
        n: x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype != np.int32 else x
        for n, x in a.items()
    }
    want = numpy_definition(**{"bonus": None, **a})
    with jax.enable_x64(True):
        got = attend(**a, backend="reference")
    assert_close(got, want, "float64")


@pytest.mark.parametrize("decay", ["bth", "bthk"])
def test_reference_gradient_is_the_slope(decay):
    """Finite differences along a random direction, float64."""
    a = Case(T=9, decay=decay, state=True, packed=True, bonus=True).arguments()
    rest = {"segment_ids": a.pop("segment_ids"), "backend": "reference"}
    with jax.enable_x64(True):
        a = {n: jnp.asarray(x, jnp.float64) for n, x in a.items()}
        weigh = np.random.default_rng(0).standard_normal

        def loss(a):
            out, state = attend(**a, **rest)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

        step = {n: jnp.asarray(weigh(x.shape)) for n, x in a.items()}
        gradient = jax.grad(loss)(a)
        slope = sum(jnp.sum(gradient[n] * step[n]) for n in a)

        def moved(by):
            return loss({n: a[n] + by * step[n] for n in a})

        measured = (moved(1e-6) - moved(-1e-6)) / 2e-6
        assert abs(slope - measured) < 1e-7 * abs(measured)


@pytest.mark.parametrize("decay", [None, "bth", "bthk"])
def test_split_and_packed_equal_whole(decay):
    a = Case(T=90, decay=decay, state=True, B=1).arguments()
    whole, final = attend(**a)
    per_token = [n for n in ("q", "k", "v", "log_decay") if n in a and a[n].ndim > 1]

    def part(lo, hi, state):
        return attend(**{**a, **{n: a[n][:, lo:hi] for n in per_token}, "initial_state": state})

    first, state = part(0, 37, a["initial_state"])
    second, state = part(37, 90, state)
    assert_close((jnp.concatenate([first, second], 1), state), (whole, final), "float32")

    fresh, fresh_state = part(37, 90, jnp.zeros_like(state))
    packed = attend(**a, segment_ids=(np.arange(90) >= 37)[None].astype(np.int32))
    assert_close(packed, (jnp.concatenate([first, fresh], 1), fresh_state), "float32")


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_forward_mode_and_second_derivatives(backend):
    """jvp equals vjp, and the Hessian along two directions is symmetric and equals float64's."""
    case = Case(T=20, decay="bthk", state=True, K=4, V=4, B=1)

    def measure(dtype, backend):
        a = {n: jnp.asarray(x, dtype) for n, x in case.arguments().items()}
        rng = np.random.default_rng(3)
        left, right = (
            {n: jnp.asarray(rng.standard_normal(x.shape), dtype) for n, x in a.items()} for _ in "lr"
        )

        def loss(a):
            out, state = attend(**a, backend=backend)
            return jnp.sum(jnp.sin(out)) + jnp.sum(state**2)

        def along(direction):
            return lambda a: jax.jvp(loss, (a,), (direction,))[1]

        gradient = jax.grad(loss)(a)
        slope = sum(jnp.vdot(gradient[n], left[n]) for n in a)
        curvature = jax.jvp(along(left), (a,), (right,))[1]
        reverse = jax.grad(along(left))(a)
        return (
            [slope, along(left)(a)],
            [curvature, sum(jnp.vdot(reverse[n], right[n]) for n in a)],
        )

    with jax.enable_x64(True):
        want = measure(jnp.float64, "reference")
        assert error(want[0][1], want[0][0]) < 1e-12
        assert error(want[1][1], want[1][0]) < 1e-12
    assert_close(measure(jnp.float32, backend), want, "float32", times=4)  # sums of thousands of signed terms


def test_vmap_equals_a_loop():
    a = Case(T=33, decay="bthk", state=True).arguments()
    stacked = {n: jnp.stack([x, x[::-1]]) for n, x in a.items()}
    got = jax.vmap(lambda a: attend(**a))(stacked)
    for i, flip in enumerate([slice(None), slice(None, None, -1)]):
        want = attend(**{n: x[flip] for n, x in a.items()})
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), want, "float32")


@pytest.mark.parametrize("decay", [pytest.param("bth", marks=pytest.mark.full), "bthk"])
def test_strong_gates_over_65536_tokens(decay):
    """Gates from -1e-4 to -50 a step: no inf, no NaN, the error of mild gates, and none that grows with T."""
    for strongest in (-0.5, -50.0):
        case = Case(T=65536, B=1, heads=(1, 1, 1), K=4, V=4, decay=decay, mildest=-1e-4, strongest=strongest)
        arguments = case.arguments()
        values, gradients = value_and_gradients(arguments, "xla")
        want_values, want_gradients = expected(arguments)
        assert_close(values, want_values, "float32")
        assert_close(gradients, want_gradients, "float32", name="d")


def test_every_gate_at_its_strongest():
    """At -50 a step nothing of the past is left: out_t = scale (q_t . k_t) v_t, the state is k_T v_T^T."""
    a = Case(T=200, decay="bthk", mildest=-50, strongest=-50.0001).arguments()
    out, state = attend(**a, backend="xla")
    want = np.einsum("bthk,bthk,bthv->bthv", a["q"], a["k"], a["v"]) / 4
    assert_close((out, state), (want, np.einsum("bhk,bhv->bhkv", a["k"][:, -1], a["v"][:, -1])), "float32")


def test_residuals_and_temporaries_grow_with_T_alone():
    """Bytes that the gradient keeps: linear in T, and far from one state a token."""

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 64), jnp.float32)

        def loss(q, k, v, g):
            return jnp.sum(attend(q=q, k=k, v=v, log_decay=g)[0] ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(16384)
    assert long < 5 * short
    a_state_per_token = 16384 * 2 * 64 * 64 * 4
    assert long < a_state_per_token / 4
