"""Layers of experts from safetensors: the definition in NumPy, and what `transformers` computes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close

safetensors = pytest.importorskip("safetensors.numpy")

D, H, E, K = 12, 20, 6, 3
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 9, D)).astype(np.float32)
CONFIGS = {
    "mixtral": {"num_local_experts": E, "intermediate_size": H},
    "qwen3_moe": {"num_experts": E, "moe_intermediate_size": H, "intermediate_size": 7},
    "qwen3_moe-normalized": {"num_experts": E, "moe_intermediate_size": H, "norm_topk_prob": True},
}
NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def write(folder, name, prefix="model.", **changes):
    """A folder with two layers; their tensors by name."""
    kind = name.split("-")[0]
    inside, gate, value, out = NAMES[kind]
    shapes = {"gate.weight": (E, D)}
    for e in range(E):
        shapes |= {f"experts.{e}.{n}.weight": (H, D) for n in (gate, value)}
        shapes[f"experts.{e}.{out}.weight"] = (D, H)
    tensors = {
        f"{prefix}layers.{i}.{inside}.{n}": RNG.standard_normal(s).astype(np.float32)
        for i in range(2)
        for n, s in shapes.items()
    }
    tensors[f"{prefix}norm.weight"] = np.ones(D, np.float32)
    config = {"model_type": kind, "hidden_size": D, "num_experts_per_tok": K} | CONFIGS[name] | changes
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(tensors, folder / "model.safetensors")
    return {n.split(f"layers.1.{inside}.")[-1]: t for n, t in tensors.items() if "layers.1." in n}


def definition(name, tensors) -> np.ndarray:
    kind = name.split("-")[0]
    _, *names = NAMES[kind]
    x = X.reshape(-1, D).astype(np.float64)
    logits = x @ tensors["gate.weight"].T
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = np.zeros_like(x)
    for t, token in enumerate(x):
        best = np.argsort(-shares[t])[:K]
        whole = shares[t, best].sum() if name != "qwen3_moe" else 1
        for e in best:
            w1, w3, w2 = (tensors[f"experts.{e}.{n}.weight"].astype(np.float64) for n in names)
            gate = w1 @ token
            y[t] += shares[t, e] / whole * (w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ token)))
    return y.reshape(X.shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_is_the_definition(name, tmp_path):
    tensors = write(tmp_path, name, prefix="" if name == "qwen3_moe" else "model.")
    module, variables = frugax.layers.pretrained.load_experts(tmp_path, 1)
    y = jax.jit(module.apply)(variables, jnp.asarray(X))
    assert_close(y, definition(name, tensors), "float32")
    fresh = jax.eval_shape(module.init, jax.random.key(0), X)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, fresh)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_is_that_of_transformers(name, tmp_path):
    """Of a model that `transformers` made and wrote."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe"}[name.split("-")[0]]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=11, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_experts_per_tok=K, head_dim=6, **CONFIGS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape))
        block = model.model.layers[1]
        theirs = getattr(block, "block_sparse_moe", None) or block.mlp
        want = theirs(torch.tensor(X))
        want = want[0] if isinstance(want, tuple) else want  # before version 5 with the router's logits
    model.save_pretrained(tmp_path)
    module, variables = frugax.layers.pretrained.load_experts(tmp_path, 1)
    assert_close(jax.jit(module.apply)(variables, jnp.asarray(X)), want.numpy(), "float32")


@pytest.mark.parametrize(
    ("changes", "layer", "says"),
    [
        ({"model_type": "olmoe"}, 0, "model_type: got 'olmoe'; expected one of 'mixtral', 'qwen3_moe'"),
        ({"hidden_act": "gelu"}, 0, "hidden_act: got 'gelu'; expected 'silu'"),
        (
            {"num_local_experts": E + 1},
            0,
            r"missing: experts.6.w1.weight, .*: gate.weight \[6, 12\]",
        ),
        ({}, 2, "layer: 2 of .* has no such experts .*missing: gate.weight"),
    ],
)
def test_bad_input(changes, layer, says, tmp_path):
    write(tmp_path, "mixtral", **changes)
    with pytest.raises(ValueError, match=says):
        frugax.layers.pretrained.load_experts(tmp_path, layer)


def test_a_config_without_the_number_of_experts(tmp_path):
    write(tmp_path, "mixtral")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_local_experts"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: has no 'num_local_experts'"):
        frugax.layers.pretrained.load_experts(tmp_path, 0)
