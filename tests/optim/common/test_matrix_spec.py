"""A spec's decisions for leaves, their views as matrices, and the errors for mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import frugax
from frugax.optim import MatrixAxes, MatrixSpec


def seen(spec, params, side="short"):
    return {d.path: d.view and d.view.matrices for d in spec.decisions(params, side)}


def test_a_decoder_of_this_library():
    blocks = (
        frugax.layers.Block("SlidingWindowAttention", "GLU", {"heads": 2}),
        frugax.layers.Block("GatedLinearAttention", "MLP", {"heads": 2, "conv_width": 4}),
    )
    model = frugax.layers.Decoder(vocab_size=20, width=16, blocks=blocks, repeats=3, tie_embeddings=False)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    found = seen(MatrixSpec(), params)
    assert found["embedding"] is found["head"] is found["norm/weight"] is None
    assert found["layers/block_0/mixer_norm/weight"] is None
    assert found["layers/block_0/mixer/qkv/kernel"] == (3, 16, 48)
    matrices = {path for path, matrix in found.items() if matrix}
    assert matrices == {path for path in found if path.endswith("/kernel")}


@pytest.mark.parametrize(
    ("path", "shape", "matrices"),
    [
        ("w1", (32, 64), (32, 64)),  # any name, where sides are no vectors'
        ("mixing", (3, 48, 64), (3, 48, 64)),
        ("mixing", (16, 64), None),  # 16 layers' vectors, perhaps
        ("w12", (4, 6), (4, 6)),
        ("Kernel", (4, 6), (4, 6)),
        ("linear/w", (4, 6), (4, 6)),
        ("normal_mlp/kernel", (4, 6), (4, 6)),
        ("conversion/kernel", (4, 6), (4, 6)),
        ("unembedded_mlp/kernel", (4, 6), (4, 6)),
        ("MultiHeadDotProductAttention_0/out/kernel", (4, 6), (4, 6)),
        ("headless/kernel", (4, 6), (4, 6)),
        ("LayerNorm_0/kernel", (64, 64), None),
        ("RMSNorm/weight", (64, 64), None),
        ("layers/ln_1/weight", (64, 64), None),
        ("Conv_0/kernel", (3, 64, 64), None),
        ("causal_conv1d/weight", (64, 64), None),
        ("TokenEmbed/weight", (64, 64), None),
        ("wte", (64, 64), None),
        ("lm_head/kernel", (64, 64), None),
        ("Head_0/kernel", (64, 64), None),
        ("layers/dt_bias", (64, 64), None),
        ("layers/linear/b", (64, 64), None),
        ("layers/A_log", (64, 64), None),
        ("layers/scale", (64, 64), None),
    ],
)
def test_leaves_by_name_and_shape(path, shape, matrices):
    names = path.split("/")
    tree = {"other": {"kernel": jnp.ones((2, 2))}}
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    for name in reversed(names):
        leaf = {name: leaf}
    assert seen(MatrixSpec(), tree | leaf)[path] == matrices


def test_weights_that_say_which_axis_is_the_input():
    """Equinox and PyTorch have [out, in]: it is told, not guessed, and decides where the two differ."""
    params = {"weight": jnp.arange(12.0).reshape(2, 6)}
    spec = MatrixSpec(axes=MatrixAxes(rows=(-1,), cols=(-2,)))
    assert seen(spec, params, "rows") == seen(MatrixSpec(), params, "cols") == {"weight": (6, 2)}
    g = jax.random.normal(jax.random.key(0), (4, 6))

    def updates(g, spec):
        rule = frugax.optim.trion(1.0, rank=2, spec=spec)
        return rule.update({"weight": g}, rule.init({"weight": g}))[0]["weight"]

    np.testing.assert_allclose(updates(g.T, spec).T, updates(g, None), rtol=1e-5, atol=1e-6)
    gain = jnp.linalg.norm(updates(g, None)) / jnp.linalg.norm(updates(g, spec))
    np.testing.assert_allclose(gain, 1.5**0.5, rtol=1e-5)  # sqrt(outputs / inputs)


def test_attention_kernels_without_a_rule_are_warned_of():
    params = {"query": {"kernel": jax.ShapeDtypeStruct((512, 8, 64), jnp.float32)}}
    init = frugax.optim.galore(1e-3, rank=4).init
    apart, whole = 512 * 4 * (8 * 4 + 2 * 4 * 64) + 4, 4 * (512 * 4 + 2 * 4 * 512) + 4
    says = rf"query/kernel of shape \[512, 8, 64\] .*512 matrices of 8 x 64 .*{apart} bytes.*{whole}"
    with pytest.warns(UserWarning, match=says):
        jax.eval_shape(init, params)
    rules = {"query/kernel": MatrixAxes((-3,), (-2, -1))}  # as it says; warnings fail tests
    state = jax.eval_shape(frugax.optim.galore(1e-3, rank=4, spec=MatrixSpec(rules=rules)).init, params)
    assert frugax.optim.state_bytes(state[0].leaves) == whole


def test_axes_and_sides():
    x = jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    spec = MatrixSpec(
        rules={"qkv": MatrixAxes(rows=(1,), cols=(2, 3)), "t": MatrixAxes(rows=(3,), cols=(0,))}
    )
    params = {"qkv": x, "t": x}
    assert seen(spec, params) == {"qkv": (2, 3, 20), "t": (3, 4, 2, 5)}
    assert seen(spec, params, "long") == {"qkv": (2, 20, 3), "t": (3, 4, 5, 2)}
    assert seen(spec, params, "rows")["t"] == seen(spec, params, "long")["t"]
    assert seen(spec, params, "cols")["qkv"] == (2, 20, 3)
    for decision in spec.decisions(params):
        np.testing.assert_array_equal(decision.view.join(decision.view.split(x)), x)
    view = spec.decisions(params)[1].view
    np.testing.assert_array_equal(view.split(x)[1, 2], x[:, 1, 2, :])


def test_the_unsharded_side():
    params = {"up": {"w": jnp.ones((4, 6))}, "down": {"w": jnp.ones((6, 4))}}
    spec = MatrixSpec(partition=(("up", P(None, "x")), ("down", P(None, "x"))))
    assert seen(spec, params, "unsharded") == {"up/w": (4, 6), "down/w": (6, 4)}
    spec = MatrixSpec(partition=(("up", P("x")), ("down", P("x", "y"))))
    assert seen(spec, params, "unsharded") == {"up/w": (6, 4), "down/w": (4, 6)}


@pytest.mark.parametrize(
    ("spec", "params", "words"),
    [
        (
            MatrixSpec(rules={"qvk": None}),
            {"w": jnp.ones((2, 3))},
            ["rules", "'qvk'", "matches no leaf", "w"],
        ),
        (MatrixSpec(partition={"b": P()}), {"w": jnp.ones((2, 3))}, ["partition", "'b'"]),
        (MatrixSpec(rules={"w": MatrixAxes()}), {"w": jnp.ones(3)}, ["w of shape [3]", "two"]),
        (MatrixSpec(rules={"w": MatrixAxes()}), {"w": jnp.ones(())}, ["w of shape []"]),
        (
            MatrixSpec(rules={"w": MatrixAxes((0,), (0,))}),
            {"w": jnp.ones((2, 3))},
            ["w of shape [2, 3]", "distinct"],
        ),
        (MatrixSpec(), {"w": jnp.ones((2, 3), jnp.int32)}, ["int32[2, 3] at w", "expected floats"]),
        (MatrixSpec(), {"bias": jnp.ones(3)}, ["no leaf is a matrix", "bias"]),
    ],
)
def test_mistakes(spec, params, words):
    with pytest.raises(ValueError) as error:
        spec.decisions(params)
    assert all(word in str(error.value) for word in words), error.value


def test_an_unknown_side():
    with pytest.raises(ValueError, match="side: got 'left'"):
        MatrixSpec().decisions({"w": jnp.ones((2, 3))}, "left")


def test_an_optimizer_says_what_becomes_of_each_leaf(caplog):
    params = {"embedding": jnp.ones((9, 4)), "said": {"kernel": jnp.ones((6, 4))}}
    with caplog.at_level("INFO", logger="frugax.optim"):
        for _ in range(2):
            jax.eval_shape(frugax.optim.galore(1e-3, rank=2).init, params)
    (message,) = caplog.messages  # once
    assert message.endswith(MatrixSpec().table(params))
    rows = [line.split("  ") for line in message.splitlines()[2:]]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["embedding", "[9, 4]", "-", "its name"],
        ["said/kernel", "[6, 4]", "4 x 6 (T)", "its name and shape"],
    ]
