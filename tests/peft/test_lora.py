"""LoRA against its equation: what it adds, what it trains, what it counts, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import frugax
from frugax.peft import LowRank, lora_apply, lora_count, lora_init, lora_merge, lora_unmerge
from tests.errors import assert_close

FUSED = ("in_gate", "dt_B_C")
WIDTH, EXPANDED, STATES, DT_RANK, REPEATS, RANK = 12, 24, 3, 1, 2, 2
TOKENS = jnp.asarray(np.arange(14).reshape(2, 7) % 5)
KEY = jax.random.key(0)


def decoder(dtype=jnp.float32):
    block = frugax.layers.Block("Mamba", "GLU", {"state_size": STATES}, {"expand": 1})
    numbers = {"dtype": dtype, "param_dtype": dtype}
    return frugax.layers.Decoder(5, WIDTH, (block,), REPEATS, backend="xla", **numbers)


@pytest.fixture(scope="module")
def params():
    return jax.jit(decoder().init)(jax.random.key(0), TOKENS)["params"]


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def init(params, targets=FUSED, alpha=None):
    """Adapters as they start."""
    start = lambda key: lora_init(key, params, targets=targets, rank=RANK, alpha=alpha)  # noqa: E731
    return jax.jit(start)(jax.random.key(1))


def trained(params, targets=FUSED, alpha=None):
    """Adapters whose b is no longer zero."""
    adapters = init(params, targets, alpha)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) / 8, x.dtype), adapters)


def test_shapes_and_count_are_as_computed(params):
    adapters = init(params)
    layer = "layers/block_0/mixer"
    sides = {"in_gate": (WIDTH, 2 * EXPANDED), "dt_B_C": (EXPANDED, DT_RANK + 2 * STATES)}
    assert set(adapters) == {f"{layer}/{name}/kernel" for name in sides}
    for name, (m, n) in sides.items():
        pair = adapters[f"{layer}/{name}/kernel"]
        assert pair.a.shape == (REPEATS, m, RANK)
        assert pair.b.shape == (REPEATS, RANK, n)
    assert lora_count(adapters) == REPEATS * RANK * sum(m + n for m, n in sides.values())


def test_targets_are_ends_of_paths(params):
    def found(*targets):
        return set(jax.eval_shape(lambda key: lora_init(key, params, targets=targets, rank=1), KEY))

    mixer, channel = "layers/block_0/mixer/out/kernel", "layers/block_0/channel/out/kernel"
    assert found("out") == {mixer, channel}
    assert found("mixer/out") == found("mixer/out/kernel") == {mixer}
    assert found("embedding", "out") == {"embedding", mixer, channel}
    with pytest.raises(
        ValueError, match=r"targets: 'ixer/out' matches no leaf; expected the end of one of embedding"
    ):
        found("out", "ixer/out")


def test_any_tree_and_each_matrix_of_a_stack_by_itself():
    tree = [{"w": jnp.zeros((3, 4, 9, 5))}, (jnp.ones((5, 2)),)]
    adapters = trained(tree, targets=("0/w", "1/0"), alpha=3.0)
    stack, alone = adapters["0/w"], adapters["1/0"]
    assert stack.a.shape == (3, 4, 9, RANK)
    assert stack.scale == 1.5
    merged = jax.tree.map(np.asarray, jax.jit(lora_merge)(tree, adapters))
    assert_close(merged[0]["w"][2, 1], 1.5 * np.asarray(stack.a)[2, 1] @ np.asarray(stack.b)[2, 1], "float32")
    assert_close(merged[1][0], 1 + 1.5 * np.asarray(alone.a) @ np.asarray(alone.b), "float32")


def test_a_has_unit_gain():
    """a's entries have variance 1 / m; of 64 * 512 of them the sample's own spread is under 1%."""
    (pair,) = lora_init(jax.random.key(0), {"w": jnp.ones((512, 64))}, targets=("w",), rank=64).values()
    assert float(jnp.var(pair.a)) == pytest.approx(1 / 512, rel=0.05)
    assert not pair.b.any()


def test_at_first_nothing_changes_then_merged_is_unmerged(params):
    module, targets = decoder(), (*FUSED, "channel/out")
    fresh = init(params, targets)
    adapters = trained(params, targets=targets, alpha=1.0)

    @jax.jit
    def both(params, adapters):
        """Logits beside adapters, and with them merged."""
        beside, _ = lora_apply(module, {"params": params}, adapters, TOKENS)
        return beside, module.apply({"params": lora_merge(params, adapters)}, TOKENS)[0]

    jax.tree.map(np.testing.assert_array_equal, jax.jit(lora_merge)(params, fresh), params)
    (before, same), (after, merged) = both(params, fresh), both(params, adapters)
    assert_close(before, same, "float32")
    assert_close(after, merged, "float32")
    assert np.max(np.abs(np.subtract(after, before))) > 0.1 * np.max(np.abs(before))


def test_one_layer_in_bfloat16():
    """Merged rounds W and the result, unmerged three sums: each by 0.29 units in rms, together by 0.65."""
    layer = nn.Dense(9, use_bias=False, dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((50, 40)), jnp.float32)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    adapters = trained(variables["params"], targets=("kernel",))

    @jax.jit
    def both(variables, adapters):
        merged = lora_merge(variables["params"], adapters)
        return lora_apply(layer, variables, adapters, x), layer.apply({"params": merged}, x)

    apart, merged = both(variables, adapters)
    assert apart.dtype == jnp.bfloat16
    assert_close(apart, merged, "bfloat16")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unmerge_undoes_merge(params, dtype):
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), params)
    adapters = trained(params)
    before, merged = by_path(params), jax.jit(lora_merge)(params, adapters)
    back, merged = by_path(jax.jit(lora_unmerge)(merged, adapters)), by_path(merged)
    for path, leaf in before.items():
        assert back[path].dtype == merged[path].dtype == dtype
        assert np.array_equal(merged[path], leaf) == (path not in adapters)
        if path in adapters:
            assert_close(back[path], leaf, dtype, name=path)
        else:
            np.testing.assert_array_equal(back[path], leaf)


def test_the_gradient_is_the_chain_rule_and_reaches_adapters_alone(params):
    """With G the gradient of W: a's is scale G b^T, b's is scale a^T G, for every matrix of the stack."""
    module, adapters = decoder().clone(remat=True), trained(params, alpha=1.0)

    def loss(logits_and_state):
        return jnp.sum(jax.nn.log_softmax(logits_and_state[0])[..., 0])

    grads = jax.jit(jax.grad(lambda a: loss(lora_apply(module, {"params": params}, a, TOKENS))))(adapters)
    merged = jax.jit(lora_merge)(params, adapters)
    full = jax.jit(jax.grad(lambda p: loss(module.apply({"params": p}, TOKENS))))(merged)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    for path, pair in adapters.items():
        G = np.asarray(by_path(full)[path], np.float64)
        a, b = np.asarray(pair.a, np.float64), np.asarray(pair.b, np.float64)
        assert_close(grads[path].a, 0.5 * G @ b.swapaxes(1, 2), "float32", name=path)
        assert_close(grads[path].b, 0.5 * a.swapaxes(1, 2) @ G, "float32", name=path)


def test_decoding_and_packing_go_through(params):
    """A state handed on and segment_ids reach the module as in its own apply."""
    module, adapters = decoder(), trained(params)
    segments = jnp.array([[0] * 4 + [1] * 3] * 2)

    @jax.jit
    def run(params, adapters):
        whole, _ = lora_apply(module, {"params": params}, adapters, TOKENS, segment_ids=segments)
        first, state = lora_apply(
            module, {"params": params}, adapters, TOKENS[:, :4], segment_ids=segments[:, :4]
        )
        rest, _ = lora_apply(module, {"params": params}, adapters, TOKENS[:, 4:], state, segments[:, 4:])
        return jnp.concatenate([first, rest], 1), whole

    assert_close(*run(params, adapters), "float32")


def test_what_can_not_be_right_is_refused(params, unchecked_types):
    key = jax.random.key(0)
    with pytest.raises(
        ValueError, match=r"rank: got 8; expected 1 to 7 for layers/block_0/mixer/dt_B_C/kernel"
    ):
        lora_init(key, params, targets=FUSED, rank=8)
    with pytest.raises(ValueError, match="rank: got 0"):
        lora_init(key, params, targets=FUSED, rank=0)
    with pytest.raises(ValueError, match=r"targets: norm/weight is float32\[12\]; expected a floating dtype"):
        lora_init(key, params, targets=("norm/weight",), rank=1)
    with pytest.raises(ValueError, match="targets: got 'out'; expected a tuple"):
        lora_init(key, params, targets="out", rank=1)
    embedding = lora_init(key, params, targets=("embedding",), rank=1)
    with pytest.raises(ValueError, match=r"adapters: got embedding; expected kernels of Dense"):
        lora_apply(decoder(), {"params": params}, embedding, TOKENS)
    with pytest.raises(ValueError, match="adapters: got 'elsewhere'; expected one of embedding"):
        lora_merge(params, {"elsewhere": embedding["embedding"]})
    wrong = {"embedding": LowRank(jnp.ones((4, 1)), jnp.ones((1, WIDTH)), 1.0)}
    with pytest.raises(ValueError, match=r"adapters: got a \[4, 1\] and b \[1, 12\] for embedding"):
        lora_merge(params, wrong)
