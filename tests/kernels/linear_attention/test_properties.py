"""Properties of linear attention's equation, on any backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.kernels.linear_attention import xla
from frugax.kernels.linear_attention.features import taylor
from frugax.kernels.linear_attention.inputs import check
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS, expected, run, value_and_gradients

from .calls import STRONG

ROW = OPERATIONS["linear_attention"]


def attend(backend=None, **arguments):
    return run(ROW, arguments, backend)


def test_a_constant_gate_is_a_fixed_decay():
    """[H], [B, T, H] and [B, T, H, K] decays that hold the same number give the same answer (GLA's check)."""
    a = ROW.arguments({"T": 77, "state": True, "packed": True})
    slopes = np.array([-0.02, -0.7], np.float32)
    want = attend(**a, log_decay=slopes)
    per_head = np.broadcast_to(slopes, a["q"].shape[:3])
    assert_close(attend(**a, log_decay=per_head), want, "float32")
    assert_close(attend(**a, log_decay=np.broadcast_to(per_head[..., None], a["q"].shape)), want, "float32")


@pytest.mark.parametrize("T", [*(pytest.param(T, marks=pytest.mark.full) for T in (1, 50)), 129])
def test_equals_the_masked_quadratic_form(T):
    """((Q K^T) * M) V with M[i, j] = lambda^(i - j), values and gradients (Lightning Attention's check)."""
    a = ROW.arguments({"T": T, "decay": "h"})
    weights = np.random.default_rng(0).standard_normal(a["v"].shape)

    def quadratic(q, k, v, log_decay):
        steps = (np.arange(T)[:, None] - np.arange(T))[None, None]
        decay = jnp.where(steps >= 0, jnp.exp(log_decay[None, :, None, None] * np.maximum(steps, 0)), 0)
        scores = jnp.einsum("bihk,bjhk->bhij", q, k, precision="highest") * decay
        return jnp.einsum("bhij,bjhv->bihv", scores, v, precision="highest")

    def ours(**a):
        return attend(**a, scale=1.0)[0]

    def run(f, a):
        return jax.jit(jax.value_and_grad(lambda a: jnp.sum(f(**a) * weights)))(a)

    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, run(quadratic, {n: x.astype(np.float64) for n, x in a.items()}))
    value, gradients = run(ours, a)
    if T == 1:
        want[1].pop("log_decay"), gradients.pop("log_decay")  # no decay lies between a token and itself
    assert_close((value, gradients), want, "float32")


@pytest.mark.parametrize("decay", [*(pytest.param(d, marks=pytest.mark.full) for d in (None, "bth")), "bthk"])
def test_the_chunk_size_never_changes_the_answer(decay, monkeypatch):
    a = ROW.arguments({"T": 70, "decay": decay, "state": True, "packed": True, "heads": (2, 1, 2)})
    a = {n: jnp.asarray(x) for n, x in a.items()}
    names = ("q", "k", "v", "log_decay", "bonus", "initial_state", "segment_ids")
    call = check(*(a.get(n) for n in names))
    answers = []
    for chunk in (1, 16, 64, 128):
        monkeypatch.setattr(xla, "CHUNK", chunk)
        answers.append(jax.jit(lambda call: xla.forward.__wrapped__(call, 0.25))(call))
    for other in answers[1:]:
        assert_close(other, answers[0], "float32")


@pytest.mark.parametrize("decay", [pytest.param("bth", marks=pytest.mark.full), "bthk"])
def test_strong_gates_over_65536_tokens(decay):
    """Gates from -1e-4 to -50 a step: no inf, no NaN, the error of mild gates, and none that grows with T."""
    case = {"T": 65536, "B": 1, "heads": (1, 1, 1), "K": 4, "V": 4, "decay": decay}
    for gates in ({"mildest": -1e-4, "strongest": -0.5}, STRONG):
        want_results, want_gradients = expected(ROW, case | gates)
        results, gradients = value_and_gradients(ROW, ROW.arguments(case | gates), "xla")
        assert_close(results, want_results, "float32")
        assert_close(gradients, want_gradients, "float32", name="d")


def test_every_gate_at_its_strongest():
    """At -50 a step nothing of the past is left: out_t = scale (q_t . k_t) v_t, the state is k_T v_T^T."""
    a = ROW.arguments({"T": 200, "decay": "bthk", "mildest": -50, "strongest": -50.0001})
    out, state = attend("xla", **a)
    want = np.einsum("bthk,bthk,bthv->bthv", a["q"], a["k"], a["v"]) / 4
    assert_close((out, state), (want, np.einsum("bhk,bhv->bhkv", a["k"][:, -1], a["v"][:, -1])), "float32")


@pytest.mark.parametrize("decay", ["bth", pytest.param("bthk", marks=pytest.mark.full)])
def test_residuals_and_temporaries_grow_with_T_alone(decay):
    """Bytes that the gradient keeps: linear in T, and far from one state a token."""

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 64), jnp.float32)
        gate = x if decay == "bthk" else jax.ShapeDtypeStruct((1, T, 2), jnp.float32)

        def loss(q, k, v, g):
            return jnp.sum(attend(q=q, k=k, v=v, log_decay=g)[0] ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, x, x, gate).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(16384)
    assert long < 5 * short
    a_state_per_token = 16384 * 2 * 64 * 64 * 4
    assert long < a_state_per_token / 4


@pytest.mark.full
def test_features_made_inside_are_never_all_in_memory():
    """Temporaries of a gradient: a small part of what the features of q and k alone would take."""
    T, H, K = 16384, 4, 16
    q, v = (jax.ShapeDtypeStruct((1, T, H, width), jnp.float32) for width in (K, 8))
    features = 2 * T * H * 153 * 4

    def temporaries(**how):
        def loss(q, k, v):
            q, k = (q, k) if how else (taylor(q), taylor(k))
            return jnp.sum(attend("xla", q=q, k=k, v=v, **how)[0] ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(feature_map="taylor") < 0.5 * features < temporaries()
