"""Trees packed by rules: what is packed, what it says, where it runs, and files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import frugax
from frugax.formats import QuantizedTensor, quantize
from frugax.layers import Block, Decoder
from frugax.quant import load_params, quantize_params, save_params
from tests.errors import assert_close, error

V, D = 11, 24
TOKENS = jnp.asarray(np.random.default_rng(0).integers(V, size=(2, 6)))
RULES = {"channel/out/kernel": ("nf4", 8), "kernel$": ("int6", 16), "embedding": "int8"}


def is_packed(x):
    return isinstance(x, QuantizedTensor)


def dequantized(params):
    return jax.tree.map(lambda x: x.dequantize() if is_packed(x) else x, params, is_leaf=is_packed)


@functools.cache
def make():
    """(a decoder of two scanned layers, its params, the packed ones, the table)."""
    model = Decoder(
        V, D, (Block("GatedLinearAttention", "GLU", {"heads": 2, "gate_rank": 3}),), 2, backend="xla"
    )
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    return model, params, *quantize_params(params, RULES)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_packed)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_the_same_decoder_runs_the_packed_tree():
    """Scanned over depth, under jit: the logits and the state of the dequantized weights."""
    model, params, packed, _ = make()
    run = jax.jit(model.apply)
    got = run({"params": packed}, TOKENS)
    assert_close(got, run({"params": dequantized(packed)}, TOKENS), "float32")
    full, _ = run({"params": params}, TOKENS)
    assert 0.01 < error(got[0], full) < 0.3, "it ran the packed weights, and they are near the params"


def test_gradients_of_what_is_not_packed_pass_through_a_packed_tree():
    """Under remat, in what stayed an array: as through the dequantized weights."""
    model, _, packed, _ = make()
    model = model.clone(remat=True)
    scales = {path: x for path, x in by_path(packed).items() if path.endswith("norm/weight")}

    def gradient(params):
        def loss(scales):
            put = lambda path, x: scales.get(jax.tree_util.keystr(path, simple=True, separator="/"), x)  # noqa: E731
            changed = jax.tree_util.tree_map_with_path(put, params, is_leaf=is_packed)
            return jnp.var(model.apply({"params": changed}, TOKENS)[0])

        return jax.jit(jax.grad(loss))(scales)

    assert_close(gradient(packed), gradient(dequantized(packed)), "float32")


def test_the_first_rule_found_counts():
    _, params, packed, table = make()
    found = by_path(packed)
    for path, leaf in by_path(params).items():
        pattern = next((rule for rule in RULES if path.endswith(rule.rstrip("$"))), None)
        assert is_packed(found[path]) == (pattern is not None), path
        if pattern is None:
            assert found[path] is leaf
            continue
        format, size = RULES[pattern] if isinstance(RULES[pattern], tuple) else (RULES[pattern], None)
        axis = -1 if path == "embedding" else -2
        want = jax.jit(lambda x, f=format, a=axis, s=size: quantize(x, f, axis=a, group_size=s))(leaf)
        jax.tree.map(np.testing.assert_array_equal, found[path], want)
    again, rest = quantize_params(params, {"out/kernel": None, "kernel": "int8"})
    assert all(
        is_packed(x) == (path.endswith("kernel") and "out" not in path) for path, x in by_path(again).items()
    )
    assert len(rest.arrays) < len(table.arrays)


def test_the_table_tells_bytes_and_errors():
    _, params, packed, table = make()
    assert table.bytes_before == sum(x.nbytes for x in jax.tree.leaves(params))
    assert table.bytes == sum(x.nbytes for x in jax.tree.leaves(packed))
    leaves, found = by_path(params), by_path(packed)
    for row in table.arrays:
        assert row.bytes_before == leaves[row.path].nbytes
        assert row.bytes == found[row.path].nbytes
        assert row.error == pytest.approx(error(found[row.path].dequantize(), leaves[row.path]), rel=1e-4)
    lines = str(table).splitlines()
    assert len(lines) == len(table.arrays) + 3
    assert len({len(line) for line in lines[:-2]}) == 1, "columns are aligned"
    assert f"{table.bytes:,}" in lines[-1]


def test_a_rule_may_be_a_function_of_the_path_and_the_array():
    _, params, _, _ = make()
    seen = []

    def twice(path, w):
        seen.append(path)
        return quantize(2 * w, "int8", axis=-2)

    packed, table = quantize_params(params, {"mixer/out/kernel": twice})
    assert seen == ["layers/block_0/mixer/out/kernel"]
    assert table.arrays[0].error == pytest.approx(1, abs=0.02)
    again, second = quantize_params(packed, {"kernel": "int4"})
    assert by_path(again)[seen[0]] is by_path(packed)[seen[0]], "packed already"
    assert seen[0] not in {row.path for row in second.arrays}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "rules: got none"),
        (
            {"kernel": "int4", "kernels": None},
            "rules: 'kernels' counts for no array; expected to find it, and no",
        ),
        ({"kernel": "int4", "out/kernel": None}, "rules: 'out/kernel' counts for no array"),
        ({"(": "int4"}, r"rules: got '\('; expected a regular expression"),
        ({"kernel": "int9"}, "rules: 'kernel' found .*/kernel: format: got 'int9'"),
        ({"kernel": ("int4", "32")}, "rules: 'kernel' found .*/kernel: group_size: got '32'"),
        ({"kernel": ("int4",)}, r"rules: 'kernel' found .*/kernel: got \('int4',\); expected a pair"),
        ({"^norm/weight": "int4"}, r"found norm/weight: got float32\[24\]; expected a floating matrix"),
        (
            {"mixer_norm": "int8"},
            r"found .*mixer_norm/weight: got .*, no matrix by its name; expected a rule",
        ),
        ({"channel/out/kernel": lambda path, w: w}, "its function gave .*; expected a QuantizedTensor"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_rules_that_cannot_be_right(rules, message):
    with pytest.raises(ValueError, match=message):
        quantize_params(make()[1], rules)


def test_what_is_read_entry_by_entry_is_refused():
    mixer = {"A_log": jnp.ones((16, 3)), "conv": {"weight": jnp.ones((3, 16))}, "mu_k": jnp.ones((2, 16))}
    for name in ("A_log", "conv/weight", "mu_k"):
        with pytest.raises(
            ValueError, match=f"found mixer/{name}: got .*, no matrix by its name; expected a"
        ):
            quantize_params({"mixer": mixer}, {name: "int8"})


def test_groups_that_do_not_divide_are_refused_where_asked():
    params = {"kernel": jnp.ones((20, 4))}
    with pytest.raises(ValueError, match="found kernel: group_size: got 16 for 20 elements"):
        quantize_params(params, {"kernel": ("int4", 16)}, partial_group=False)
    packed, _ = quantize_params(params, {"kernel": ("int4", 16)})
    assert packed["kernel"].scales.shape == (2, 4)


def test_a_packed_matrix_of_another_shape_is_refused():
    model, _, packed, _ = make()
    with pytest.raises(Exception, match=r'parameter "embedding" .* shape \(11, 24\)'):
        model.clone(width=12).apply({"params": packed}, TOKENS)


@pytest.mark.parametrize("way", ["flax", "orbax", "safetensors"])
def test_files_give_the_tree_back(way, tmp_path):
    _, params, _, _ = make()
    packed, _ = quantize_params(params, RULES | {"embedding": "nf4_dq"})
    like = jax.tree.map(jnp.zeros_like, packed)
    if way == "flax":
        back = serialization.from_bytes(like, serialization.to_bytes(packed))
    elif way == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "at", packed)
            checkpointer.wait_until_finished()
            back = checkpointer.restore(tmp_path / "at", like)
    else:
        save_params(tmp_path / "params.safetensors", packed)
        back = load_params(tmp_path / "params.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, back, packed)


def test_files_that_cannot_be_right(tmp_path):
    path = tmp_path / "params.safetensors"
    other = frugax.formats.Codebook.of("mine", [-1, 0, 2])
    mine = frugax.formats.Format("mine", other)
    with pytest.raises(ValueError, match=r"params: kernel is in .*; expected a format"):
        save_params(path, {"kernel": quantize(jnp.ones((8, 4)), mine)})
    q = quantize(jnp.ones((8, 4)), "int8")
    save_params(path, {"kernel": q})
    text = path.read_bytes().replace(b"int8", b"int6")
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"has int8\[8, 4\] for kernel/codes; expected uint8\[6, 4\]"):
        load_params(path)
