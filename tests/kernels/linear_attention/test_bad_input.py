"""Calls that can't be right say which argument, and what is expected."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

import frugax

pytestmark = pytest.mark.usefixtures("unchecked_types")

B, T, H, K, V = 2, 6, 4, 3, 5
GOOD = {"q": jnp.ones((B, T, H, K)), "k": jnp.ones((B, T, H, K)), "v": jnp.ones((B, T, H, V))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((B, T, K))}, r"q: got float32\[2, 6, 3\]; expected \[batch, time, heads, K\]"),
        ({"k": jnp.ones((B, T, H, K + 1))}, r"k: got .*4\]; expected \[2, 6, heads, 3\]"),
        ({"k": jnp.ones((B, T + 1, H, K))}, r"k: got"),
        ({"v": jnp.ones((B + 1, T, H, V))}, r"v: got"),
        ({"k": jnp.ones((B, T, 3, K))}, r"k: .* expected a number of heads that divides 4"),
        ({"q": jnp.ones((B, T, H, K), jnp.int32)}, r"q: got int32.* expected a floating dtype"),
        ({"v": jnp.ones((B, T, H, V), jnp.bfloat16)}, r"v: got bfloat16.* expected q's dtype float32"),
        (
            {"log_decay": -jnp.ones((B, T))},
            r"log_decay: got .* expected None, \[4\], \[2, 6, 4\] or \[2, 6, 4, 3\]",
        ),
        ({"log_decay": -jnp.ones((3,))}, r"log_decay: got"),
        ({"log_decay": -jnp.ones((B, T, H, V))}, r"log_decay: got"),
        ({"log_decay": -jnp.ones((B, T, H), jnp.int32)}, r"log_decay: got int32"),
        ({"bonus": jnp.ones((K,))}, r"bonus: got .* expected \[4, 3\]"),
        ({"initial_state": jnp.ones((B, H, V, K))}, r"initial_state: got .* expected \[2, 4, 3, 5\]"),
        ({"segment_ids": jnp.ones((B, T))}, r"segment_ids: got .* expected integers \[2, 6\]"),
        ({"segment_ids": jnp.ones((B, T + 1), jnp.int32)}, r"segment_ids: got"),
        (
            {"backend": "cuda"},
            r"backend: got 'cuda'; expected 'reference', 'xla', 'pallas_tpu', 'pallas_gpu' or None",
        ),
    ],
)
def test_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        jax.jit(
            lambda a: frugax.kernels.linear_attention(
                **a, **{k: v for k, v in change.items() if k == "backend"}
            )
        )({**GOOD, **{k: v for k, v in change.items() if k != "backend"}})


def test_no_tokens():
    empty = {name: x[:, :0] for name, x in GOOD.items()}
    with pytest.raises(ValueError, match=r"q: got .* expected every size >= 1"):
        frugax.kernels.linear_attention(**empty)


def test_positive_log_decay_under_checkify():
    def call(g):
        return frugax.kernels.linear_attention(**GOOD, log_decay=g)[0]

    g = -jnp.ones((B, T, H))
    checked = checkify.checkify(jax.jit(call))
    assert checked(g)[0].get() is None
    assert "log_decay" in checked(g.at[1, 2, 3].set(0.1))[0].get()
    assert jnp.isfinite(call(g.at[1, 2, 3].set(0.1))).all()  # unchecked, the call goes on


def test_a_named_kernel_that_cannot_serve_says_why():
    text = frugax.kernels.explain("linear_attention", **GOOD)  # float32: wgmma takes bfloat16
    assert "cpu: xla" in text
    assert "not pallas_gpu: " in text
    with pytest.raises(ValueError, match="backend='pallas_gpu' can't serve this call"):
        frugax.kernels.linear_attention(**GOOD, backend="pallas_gpu")


def test_explain_rejects_what_is_no_operation():
    with pytest.raises(ValueError, match="expected an operation"):
        frugax.kernels.explain("linear_atention")
