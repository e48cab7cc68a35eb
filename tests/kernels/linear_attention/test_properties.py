"""What the equation implies, whatever computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.kernels.linear_attention import xla
from frugax.kernels.linear_attention.inputs import check
from tests.errors import assert_close

from .cases import Case, attend


def test_a_constant_gate_is_a_fixed_decay():
    """[H], [B, T, H] and [B, T, H, K] decays that hold the same number give the same answer (GLA's check)."""
    a = Case(T=77, state=True, packed=True).arguments()
    slopes = np.array([-0.02, -0.7], np.float32)
    want = attend(**a, log_decay=slopes)
    per_head = np.broadcast_to(slopes, a["q"].shape[:3])
    assert_close(attend(**a, log_decay=per_head), want, "float32")
    assert_close(attend(**a, log_decay=np.broadcast_to(per_head[..., None], a["q"].shape)), want, "float32")


@pytest.mark.parametrize("T", [1, 50, 129])
def test_equals_the_masked_quadratic_form(T):
    """((Q K^T) * M) V with M[i, j] = lambda^(i - j), values and gradients (Lightning Attention's check)."""
    a = {n: jnp.asarray(x) for n, x in Case(T=T, decay="h", scale=1.0).arguments().items() if n != "scale"}
    weights = np.random.default_rng(0).standard_normal(a["v"].shape)

    def quadratic(q, k, v, log_decay):
        steps = np.arange(T)[:, None] - np.arange(T)
        decay = jnp.where(steps >= 0, jnp.exp(log_decay[:, None, None] * np.maximum(steps, 0)), 0)
        scores = jnp.einsum("bihk,bjhk->bhij", q, k, precision="highest") * decay
        return jnp.einsum("bhij,bjhv->bihv", scores, v, precision="highest")

    def ours(**a):
        return attend(**a, scale=1.0)[0]

    def run(f, a):
        return jax.value_and_grad(lambda a: jnp.sum(f(**a) * weights))(a)

    with jax.enable_x64(True):
        want = jax.tree.map(
            np.asarray, run(quadratic, {n: jnp.asarray(x, jnp.float64) for n, x in a.items()})
        )
    value, gradients = run(ours, a)
    if T == 1:
        want[1].pop("log_decay"), gradients.pop("log_decay")  # no decay lies between a token and itself
    assert_close((value, gradients), want, "float32")


@pytest.mark.parametrize("decay", [None, "bth", "bthk"])
def test_the_chunk_size_never_changes_the_answer(decay, monkeypatch):
    a = Case(T=70, decay=decay, state=True, packed=True, heads=(2, 1, 2)).arguments()
    a = {n: jnp.asarray(x) for n, x in a.items()}
    names = ("q", "k", "v", "log_decay", "bonus", "initial_state", "segment_ids")
    call = check(*(a.get(n) for n in names))
    answers = []
    for chunk in (1, 16, 64, 128):
        monkeypatch.setattr(xla, "CHUNK", chunk)
        answers.append(jax.jit(lambda call: xla.forward.__wrapped__(call, 0.25))(call))
    for other in answers[1:]:
        assert_close(other, answers[0], "float32")
