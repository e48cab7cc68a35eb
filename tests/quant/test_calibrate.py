"""Statistics of matrices' inputs: those that NumPy finds, stacked under scans, in any number of passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import frugax
from frugax.quant import (
    Statistics,
    activation_sensitivity,
    calibrate,
    outlier_permutation,
    sensitive_layers,
)
from tests.errors import assert_close

B, T, D = 3, 11, 8


def definition(x):
    """Sums over all inputs, in float64."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return Statistics(x.T @ x, x.sum(0), np.abs(x).sum(0), np.abs(x).max(0), len(x))


class Shared(nn.Module):
    """Two calls of one matrix, a matrix of heads and one back from them, and one that is not called."""

    @nn.compact
    def __call__(self, x, *, twice: bool):
        dense = nn.Dense(D, name="dense")
        y = dense(x)
        if twice:
            y = dense(nn.relu(y))
        heads = nn.DenseGeneral((2, 3), name="heads")(y)
        z = nn.DenseGeneral(D, axis=(-2, -1), name="merge")(heads)
        nn.Conv(4, (3,), name="conv")(z)
        return y, heads


def test_sums_are_those_of_all_calls():
    module = Shared()
    batches = [jax.random.normal(jax.random.key(i), (B, T, D)) + 0.5 for i in range(3)]
    variables = jax.jit(functools.partial(module.init, twice=True))(jax.random.key(9), batches[0])
    found = calibrate(module, variables, ((x,) for x in batches), twice=True)  # one pass: an iterator will do
    assert list(found) == ["dense/kernel", "heads/kernel", "merge/kernel"]
    first, second = (jax.jit(functools.partial(module.apply, twice=twice)) for twice in (False, True))
    once = [first(variables, x)[0] for x in batches]
    y, heads = zip(*(second(variables, x) for x in batches), strict=True)
    want = {
        "dense/kernel": definition(np.concatenate([*batches, *(np.maximum(y, 0) for y in once)])),
        "heads/kernel": definition(np.concatenate(y)),
        "merge/kernel": definition(np.concatenate(heads).reshape(-1, 6)),
    }
    assert_close(found, want, "float32")
    dense = found["dense/kernel"]
    x = np.concatenate([*batches, *(np.maximum(y, 0) for y in once)]).reshape(-1, D)
    np.testing.assert_allclose(dense.mean, x.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dense.mean_abs, np.abs(x).mean(0), rtol=1e-4)
    assert dense.rank == D


def test_layers_under_a_scan_are_stacked_as_their_params_are():
    block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 2, "gate_rank": 3})
    deep = frugax.layers.Decoder(9, D, (block,), 2, remat=True, backend="xla")
    wide = frugax.layers.Decoder(9, D, (block, block), 1, backend="xla")
    batches = [jax.random.randint(jax.random.key(i), (B, T), 0, 9) for i in range(2)]
    params = jax.jit(deep.init)(jax.random.key(0), batches[0])["params"]
    stacked = params["layers"]["block_0"]
    layers = {
        f"block_{i}": jax.tree.map(lambda x, i=i: jnp.asarray(np.asarray(x)[i : i + 1]), stacked)
        for i in range(2)
    }
    found = calibrate(deep, {"params": params}, batches, max_bytes=4 * 2 * D * D, only="channel|qkv")
    apart = calibrate(wide, {"params": params | {"layers": layers}}, batches, only="channel|qkv")
    assert len(apart) == 2 * len(found) == 6
    for path, statistics in found.items():
        K = statistics.gram.shape[-1]
        assert statistics.gram.shape == (2, K, K)
        assert statistics.count.tolist() == [2 * B * T] * 2
        pair = [apart[path.replace("block_0", f"block_{i}")] for i in range(2)]
        assert_close(statistics, jax.tree.map(lambda *x: np.concatenate(x), *pair), "float32", name=path)


class Layer(nn.Module):
    """The body of a scan: a mixer that reads both ways, or two blocks."""

    shared: str | None = None

    @nn.compact
    def __call__(self, x, _):
        if self.shared is not None:
            mixer = frugax.layers.GatedLinearAttention(heads=2, gate_rank=3, backend="xla")
            return x + frugax.layers.Bidirectional(mixer, self.shared, name="both")(x), None
        for i in range(2):
            x = x + nn.Dense(D, name=f"block_{i}")(jnp.tanh(x))
        return x, None


class Stack(nn.Module):
    """Two layers under a scan, then a matrix outside of it."""

    shared: str | None = None

    @nn.compact
    def __call__(self, x):
        how = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        scan = nn.scan(Layer, **how, check_constancy_invariants=False)  # as in the library
        return nn.Dense(3, name="last")(scan(self.shared, name="layers")(x, None)[0])


@pytest.mark.parametrize(
    "shared", ["projections", *(pytest.param(how, marks=pytest.mark.full) for how in ("all", "none"))]
)
def test_both_ways_of_a_wrapper_count(shared):
    """A matrix that both ways share has the inputs of both; the first layer's are x as it is, twice."""
    module, x = Stack(shared), jax.random.normal(jax.random.key(0), (2, 9, D))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    found = calibrate(module, variables, [x], only="both")
    ways, times = (("forward", "backward"), 1) if shared == "none" else (("forward",), 2)
    names = ("qkv_gates", "forget", "out")
    assert sorted(found) == sorted(f"layers/both/{way}/{name}/kernel" for way in ways for name in names)
    assert all(s.count.tolist() == [times * 18] * 2 for s in found.values())
    assert_close(found["layers/both/forward/qkv_gates/kernel"].gram[0] / times, definition(x).gram, "float32")
    # What calibration wrote among the params is gone, and values are as they were.
    y, after = jax.jit(functools.partial(module.apply, mutable=["params"]))(variables, x)
    assert jax.tree.structure(after["params"]) == jax.tree.structure(variables["params"])
    assert_close(y, jax.jit(module.apply)(variables, x), "float32")
    jax.tree.map(np.testing.assert_array_equal, after["params"], variables["params"])


def test_inputs_are_those_after_the_blocks_before_once_quantized():
    module = Stack()
    batches = [jax.random.normal(jax.random.key(i), (B, T, D)) for i in range(2)]
    variables = jax.jit(module.init)(jax.random.key(9), batches[0])
    asked = []

    def pack(path, w, statistics):
        asked.append(path)
        return frugax.formats.quantize(w, "int3") if path != "layers/block_1/kernel" else w * 0.5

    found = calibrate(module, variables, batches, quantize=pack)
    params = variables["params"]["layers"]
    x = np.concatenate(batches)
    for layer in range(2):
        for name in ("block_0", "block_1"):
            w, bias = params[name]["kernel"][layer], params[name]["bias"][layer]
            mine = jax.tree.map(lambda a, layer=layer: a[layer], found[f"layers/{name}/kernel"])
            assert_close(mine, definition(np.tanh(x)), "float32", name=f"{name}, {layer}")
            q = frugax.formats.quantize(w, "int3").dequantize() if name == "block_0" else w * 0.5
            x = x + np.tanh(x) @ np.asarray(q) + np.asarray(bias)
    assert_close(found["last/kernel"], definition(x), "float32")
    assert asked == ["layers/block_0/kernel", "layers/block_1/kernel"] * 2
    # A whole layer at once: its second block sees the first as it was.
    whole = calibrate(module, variables, batches, quantize=pack, together="", only="block", max_bytes=1)
    plain = calibrate(module, variables, batches)
    first = lambda s: jax.tree.map(lambda a: a[0], s)  # noqa: E731
    for name in ("layers/block_0/kernel", "layers/block_1/kernel"):
        assert_close(first(whole[name]), first(plain[name]), "float32")
    assert_close(whole["layers/block_0/kernel"], found["layers/block_0/kernel"], "float32")
    with pytest.raises(ValueError, match="batches: got an iterator for 5 passes with quantize"):
        calibrate(module, variables, iter(batches), quantize=pack)


class Pair(nn.Module):
    """Two stacks of as many layers, one after the other."""

    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            how = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
            x, _ = nn.scan(Layer, **how)(name=name)(x, None)
        return x


@pytest.mark.full
def test_a_stack_ends_before_the_next_one_in_its_module_begins():
    module, x = nn.Sequential([Pair()]), jax.random.normal(jax.random.key(0), (2 * D, D))
    variables, asked = jax.jit(module.init)(jax.random.key(1), x), []

    def pack(path, w, statistics):
        asked.append(path.split("/")[1])
        return w

    calibrate(module, variables, [x], quantize=pack)
    assert asked == ["first"] * 4 + ["second"] * 3  # nothing comes after the last


class Recurrent(nn.Module):
    """A scan over time, each step of which has the same params."""

    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.SimpleCell(4))(x)


def test_bad_input(unchecked_types):
    dense, x = nn.Dense(3), jnp.ones((2, D), jnp.float32)
    variables = jax.jit(dense.init)(jax.random.key(0), x)
    with pytest.warns(UserWarning, match="2 inputs for the 8 channels of kernel"):
        found = calibrate(dense, variables, [x])
    assert found["kernel"].rank == 2
    with pytest.raises(ValueError, match="batches: got none"):
        calibrate(dense, variables, [])
    with pytest.raises(ValueError, match="module: found no matrix with 'q' in its path"):
        calibrate(dense, variables, [x], only="q")
    with pytest.raises(ValueError, match="batches: got inputs of kernel that are not finite"):
        calibrate(dense, variables, [x * jnp.inf])
    two = nn.Sequential([nn.Dense(D), nn.Dense(D)])
    both = two.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="batches: got an iterator for 2 passes"):
        calibrate(two, both, iter([x]), max_bytes=1)
    recurrent = Recurrent()
    steps = recurrent.init(jax.random.key(0), x[None])
    with pytest.raises(ValueError, match="module: got Recurrent, a scan inside of which has the same params"):
        calibrate(recurrent, steps, [x[None]])
    with pytest.raises(ValueError, match="loss: found no matrix"):
        activation_sensitivity(lambda variables, x: x.sum(), {}, [x])
    with pytest.raises(ValueError, match="batches: got none"):
        activation_sensitivity(lambda variables, x: x.sum(), {}, [])
    with pytest.raises(ValueError, match="share: got 2"):
        sensitive_layers({}, share=2)
    with pytest.raises(ValueError, match="increases: got NaN for"):
        sensitive_layers({"a": np.nan})
    with pytest.raises(ValueError, match=r"statistics.max_abs: got \[2, 3\]"):
        outlier_permutation(jax.tree.map(lambda x: jnp.stack([x, x]), Statistics.of(jnp.ones((1, 3)))))


def test_sensitivity_is_the_loss_with_one_input_in_few_bits():
    """FlexQ's rule on a network whose second matrix reads a channel of outliers."""
    model = nn.Sequential([nn.Dense(16), jnp.tanh, nn.Dense(16), jnp.tanh, nn.Dense(4)])
    batches = [jax.random.normal(jax.random.key(i), (5, D)) for i in range(2)]
    params = model.init(jax.random.key(9), batches[0])["params"]
    kernels = [params[f"layers_{i}"]["kernel"] for i in (0, 2, 4)]
    params["layers_2"]["kernel"] = kernels[1] = kernels[1].at[0].multiply(30.0)

    def run(x, at=None):
        """The network, with the input of one matrix in int3."""
        for i, kernel in enumerate(kernels):
            if i == at:
                x = frugax.formats.quantize(x, "int3", axis=-1, group_size=8).dequantize()
            x = x @ kernel if i == 2 else jnp.tanh(x @ kernel)
        return x

    def loss(variables, x):
        return jnp.mean((model.apply(variables, x) - 0.1) ** 2)

    want = [
        np.mean([jnp.mean((run(x, at) - 0.1) ** 2) - jnp.mean((run(x) - 0.1) ** 2) for x in batches])
        for at in range(3)
    ]
    found = activation_sensitivity(loss, {"params": params}, batches, format="int3", group_size=8)
    assert list(found) == [f"layers_{i}/kernel" for i in (0, 2, 4)]
    np.testing.assert_allclose(list(found.values()), want, rtol=1e-3, atol=1e-6)
    assert sensitive_layers(found, share=0.5)[0] == max(found, key=found.get)


def test_layers_are_chosen_by_their_share():
    increases = {"a": 1.0, "b": 6.0, "c": -9.0, "d": 3.0}
    shares = {0.0: (), 0.5: ("b",), 0.6: ("b",), 0.61: ("b", "d"), 1.0: ("b", "d", "a")}
    for share, layers in shares.items():
        assert sensitive_layers(increases, share=share) == layers


def test_channels_with_outliers_come_first():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(40, 13)), rng.normal(size=(13, 2))
    x[:, [3, 7, 12]] *= (50, 100, 30)
    order, high_blocks = outlier_permutation(Statistics.of(jnp.asarray(x, jnp.float32)), block=2)
    assert order[:3].tolist() == [7, 3, 12]
    assert high_blocks == 2
    np.testing.assert_allclose(x[:, order] @ w[order], x @ w)

    def by_blocks(x, w, high_blocks):
        """Each token in blocks of two channels, the first of them in int8 and all others in int4."""
        parts = [
            frugax.formats.quantize(
                jnp.asarray(x[:, i : i + 2]), "int8" if i < 2 * high_blocks else "int4", axis=-1
            ).dequantize()
            for i in range(0, 13, 2)
        ]
        return np.linalg.norm(np.concatenate(parts, 1) @ w - x @ w) / np.linalg.norm(x @ w)

    assert by_blocks(x[:, order], w[order], high_blocks) < 0.3 * by_blocks(x, w, 0)
