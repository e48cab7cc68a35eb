"""BitLinear against its definition in float64: outputs, gradients, what is kept, packed codes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import frugax
from frugax.layers import BitLinear, Block, Decoder
from frugax.quant import quantize_params
from tests.errors import assert_close

K, N = 37, 13
LAYER = BitLinear(N, use_bias=True)
apply = jax.jit(lambda params, x: LAYER.apply({"params": params}, x))


def make(dtype=jnp.float32, rows=(2, 5)):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*rows, K)), dtype)
    shapes = jax.eval_shape(LAYER.init, jax.random.key(0), x)["params"]
    return {name: jnp.asarray(rng.standard_normal(p.shape), p.dtype) for name, p in shapes.items()}, x


def ternary(W):
    """(codes, their scale): the mean magnitude is 1."""
    scale = np.abs(W).mean()
    return np.clip(np.round(W / scale), -1, 1), scale


def normed(p, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-8) * p["norm"]


def eight_bits(n):
    scale = np.abs(n).max(-1, keepdims=True) / 127
    return np.round(n / scale), scale


def as_float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_outputs_and_gradients(dtype):
    """With n^ and W^ the rounded ones: y = n^ W^ + b, dn = dy W^^T, dW = n^^T dy, and through the norm."""
    params, x = make(dtype)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, N)), dtype)

    @jax.jit
    def run(params, x, dy):
        y, pull = jax.vjp(lambda p, x: LAYER.apply({"params": p}, x), params, x)
        return y, pull(dy)

    y, (of_params, of_x) = run(params, x, dy)
    p, x64, dy64 = as_float64((params, x, dy))
    (n, s_x), (w, s_w) = eight_bits(normed(p, x64)), ternary(p["kernel"])
    assert y.dtype == of_x.dtype == dtype
    assert_close(y, n * s_x @ (w * s_w) + p["bias"], dtype)
    dn = dy64 @ (w * s_w).T
    inverse = 1 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-8)
    unit, weighed = x64 * inverse, dn * p["norm"]
    want = {
        "kernel": np.einsum("btk,btn->kn", n * s_x, dy64),
        "norm": (dn * unit).sum((0, 1)),
        "bias": dy64.sum((0, 1)),
    }
    assert_close(of_params, want, dtype)
    assert_close(of_x, inverse * (weighed - unit * (weighed * unit).mean(-1, keepdims=True)), dtype)


def test_the_backward_pass_keeps_what_the_call_was_given():
    """Neither the norm of x nor any codes: the bytes of x and of the params, and no more."""
    params, x = make(rows=(2, 500))
    call = lambda p, x: LAYER.apply({"params": p}, x)  # noqa: E731
    _, pull = jax.eval_shape(lambda p, x: jax.vjp(call, p, x), params, x)
    kept = {leaf.shape for leaf in jax.tree.leaves(pull)}
    assert kept <= {x.shape, *(p.shape for p in params.values())}
    assert [leaf.shape for leaf in jax.tree.leaves(pull)].count(x.shape) == 1


def test_packed_codes_give_the_same_bits_and_take_two_of_them():
    """The sum in int32 is numpy's; packed or not, in either dtype, y has the same bits."""
    params, x = make()
    packed, table = quantize_params(params, {"kernel": "ternary"})
    q = packed["kernel"]
    codes, scale = ternary(np.asarray(params["kernel"]))
    np.testing.assert_array_equal(q.unpacked().T, codes)
    assert q.nbytes == -(-K // 4) * N + 4
    assert table.arrays[0].bytes == q.nbytes

    whole = np.random.default_rng(2).integers(-127, 128, (4, K)).astype(np.float32)
    whole[:, 0] = 127
    y = jax.jit(lambda x: frugax.kernels.quantized_matmul(x, q, activations="int8"))(whole)
    want = np.asarray(whole, np.int32) @ codes.astype(np.int32)
    np.testing.assert_array_equal(np.round(np.asarray(y, np.float64) / float(q.scales[0, 0])), want)
    assert_close(y, want * scale, "float32")

    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(apply(packed, x.astype(dtype)), apply(params, x.astype(dtype)))


@pytest.mark.parametrize("value", [0.0, jnp.nan, jnp.inf])
def test_a_bad_token_spoils_no_other(value):
    params, x = make()
    bad = np.array(x)
    bad[0, 2] = value
    y, spoiled = (np.asarray(apply(params, a)) for a in (x, bad))
    assert np.isfinite(spoiled[0, 2]).all() == (value == 0)
    others = np.ones((2, 5), bool)
    others[0, 2] = False
    np.testing.assert_array_equal(spoiled[others], y[others])


def test_a_matmul_free_decoder_learns_and_runs_from_ternary_codes():
    """Every matrix is a BitLinear; trained and packed, it gives the same logits, and from the same state."""
    V, tokens = 11, jnp.tile(jnp.array([[1, 5, 2, 8, 3]]), (2, 4))
    block = Block("MLGRU", "GLU", {"ternary": True}, {"ternary": True, "expand": 1})
    model = Decoder(V, 16, (block,), 2, tie_embeddings=False, ternary_head=True, backend="xla")
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    kernels = [path for path, _ in _paths(params) if path.endswith("kernel")]
    assert len(kernels) == 4 + 2 + 1
    assert all(path.replace("kernel", "norm") in dict(_paths(params)) for path in kernels)
    optimizer = optax.adam(2e-2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry

            def loss_fn(params):
                logits, _ = model.apply({"params": params}, tokens[:, :-1])
                return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=60)
        return params, losses

    params, losses = train(params)
    assert losses[0] > 2
    assert losses[-1] < 0.2
    packed, table = quantize_params(params, {"kernel": "ternary"})
    weights = sum(np.prod(row.shape) for row in table.arrays)
    assert sum(row.bytes for row in table.arrays) == weights // 4 + 4 * (2 * 6 + 1)

    @jax.jit
    def run(params):
        logits, state = model.apply({"params": params}, tokens)
        return logits, model.apply({"params": params}, tokens[:, :1], state)[0]

    assert_close(run(packed), run(params), "float32")


def _paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
