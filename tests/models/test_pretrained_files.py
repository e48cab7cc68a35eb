"""Checkpoints whose files differ from what `transformers` writes; its own are in test_pretrained.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close, error

safetensors = pytest.importorskip("safetensors.numpy")

V, D, DEPTH, RANK = 16, 8, 2, 1
CONFIG = {
    "model_type": "mamba",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": DEPTH,
    "state_size": 3,
}
CONFIG2 = CONFIG | {"model_type": "mamba2", "num_heads": 2, "head_dim": 8, "n_groups": 1}
CONFIG2["tie_word_embeddings"] = True  # by default they are not


def tensors(config, prefix="backbone."):
    """Tensors of `transformers`' names and shapes, the embedding first."""
    E, N = 2 * D, config["state_size"]
    shapes = {"norm.weight": (D,), "mixer.D": (E,), "mixer.out_proj.weight": (D, E)}
    if config["model_type"] == "mamba":
        shapes |= {
            "mixer.in_proj.weight": (2 * E, D),
            "mixer.conv1d.weight": (E, 1, 4),
            "mixer.conv1d.bias": (E,),
            "mixer.x_proj.weight": (RANK + 2 * N, E),
            "mixer.dt_proj.weight": (E, RANK),
            "mixer.dt_proj.bias": (E,),
            "mixer.A_log": (E, N),
        }
    else:
        H, wide = config["num_heads"], E + 2 * N
        shapes |= {
            "mixer.in_proj.weight": (E + wide + H, D),
            "mixer.conv1d.weight": (wide, 1, 4),
            "mixer.conv1d.bias": (wide,),
            "mixer.norm.weight": (E,),
            **{f"mixer.{name}": (H,) for name in ("A_log", "dt_bias", "D")},
        }
    rng = np.random.default_rng(0)

    def draw(*shape):
        return 0.5 * rng.standard_normal(shape).astype(np.float32)

    made = {f"{prefix}embeddings.weight": draw(V, D), f"{prefix}norm_f.weight": draw(D)}
    for i in range(DEPTH):
        made |= {f"{prefix}layers.{i}.{name}": draw(*shape) for name, shape in shapes.items()}
    return made


def load(folder, config, made):
    folder.mkdir(exist_ok=True)
    safetensors.save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return frugax.layers.pretrained.load(folder)


def logits(module, variables):
    return jax.jit(module.apply)(variables, jnp.array([[1, 2, 5, 3, 1]]))[0]


def test_a_head_of_its_own_counts_whatever_the_config_says(tmp_path):
    made = tensors(CONFIG)
    tied, variables = load(tmp_path, CONFIG, made | {"lm_head.weight": made["backbone.embeddings.weight"]})
    assert tied.tie_embeddings
    head = made["backbone.embeddings.weight"][::-1].copy()
    config = CONFIG | {"tie_word_embeddings": True}
    untied, others = load(tmp_path, config, made | {"lm_head.weight": head})
    assert not untied.tie_embeddings
    assert_close(logits(untied, others), np.asarray(logits(tied, variables))[..., ::-1], "float32")


def test_names_of_base_models_and_of_a_head_alone(tmp_path):
    module, variables = load(tmp_path, CONFIG, tensors(CONFIG))
    _, base = load(tmp_path, CONFIG, tensors(CONFIG, prefix=""))
    alone = tensors(CONFIG)
    alone["lm_head.weight"] = alone.pop("backbone.embeddings.weight")
    _, head = load(tmp_path, CONFIG, alone)
    for other in (base, head):
        assert jax.tree.all(jax.tree.map(np.array_equal, other, variables))
    assert module.tie_embeddings


@pytest.mark.parametrize("config", [CONFIG, CONFIG2], ids=["mamba", "mamba2"])
def test_original_checkpoints_are_the_same_model(tmp_path, config):
    """In mamba_ssm's words: d_model and ssm_cfg, a vocabulary to be padded, an embedding in the singular."""
    made = tensors(config)
    module, variables = load(tmp_path / "transformers", config, made)
    ssm = {"d_state": 3}
    if config is CONFIG2:
        ssm |= {"layer": "Mamba2", "headdim": 8}
    original = {
        "d_model": D, "n_layer": DEPTH, "vocab_size": V - 3, "ssm_cfg": ssm, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    made["backbone.embedding.weight"] = made.pop("backbone.embeddings.weight")
    made["lm_head.weight"] = made["backbone.embedding.weight"]
    other, others = load(tmp_path / "original", original, made)
    assert jax.tree.all(jax.tree.map(np.array_equal, others, variables))
    assert_close(logits(other, others), logits(module.clone(tie_embeddings=True), variables), "float32")
    for key, value in {"attn_layer_idx": [1], "d_intermediate": 64}.items():
        with pytest.raises(ValueError, match=f"{key}: got .*; expected"):
            load(tmp_path / "original", original | {key: value}, made)
    with pytest.raises(ValueError, match=r"ssm_cfg\.layer: got 'S4'"):
        load(tmp_path / "original", original | {"ssm_cfg": {"layer": "S4"}}, made)


def softplus(x):
    return np.log1p(np.exp(x))


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def mamba2_by_hand(p, x, low, high):
    """One layer of Mamba-2 with a norm in front of the gate and steps within limits, token by token."""
    E, N, H = 2 * D, 3, 2
    z, uBC, dt = np.split(x @ p["gate_in_dt"]["kernel"], [E, 2 * E + 2 * N], axis=-1)
    padded = np.pad(uBC, ((3, 0), (0, 0)))
    taps = p["conv"]["weight"]
    uBC = silu(sum(taps[i] * padded[i : i + len(x)] for i in range(4)) + p["conv"]["bias"])
    u, B, C = np.split(uBC, [E, E + N], axis=-1)
    dt = np.clip(softplus(dt + p["dt_bias"]), low, high)
    assert ((dt == low).any(), (dt == high).any(), ((dt > low) & (dt < high)).any()) == (True, True, True)
    u, S, out = u.reshape(-1, H, E // H), np.zeros((H, N, E // H)), []
    for t in range(len(x)):
        S = np.exp(dt[t] * -np.exp(p["A_log"]))[:, None, None] * S
        S = S + dt[t][:, None, None] * B[t][:, None] * u[t][:, None]
        out.append((np.einsum("n,hnp->hp", C[t], S) + p["D"][:, None] * u[t]).ravel())
    return (rms_norm(np.stack(out)) * p["norm"] * silu(z)) @ p["out"]["kernel"]


def test_limits_of_the_step_and_a_norm_before_the_gate():
    with jax.enable_x64(True):
        args = {"heads": 2, "state_size": 3, "norm_before_gate": True, "dt_limit": (0.4, 0.9)}
        mixer = frugax.layers.Mamba2(**args, param_dtype=jnp.float64)
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((1, 9, D)))
        shapes = jax.eval_shape(mixer.init, jax.random.key(0), x)
        variables = jax.tree.map(lambda p: jnp.asarray(0.5 * rng.standard_normal(p.shape)), shapes)
        y = np.asarray(jax.jit(mixer.apply)(variables, x)[0])
        p = jax.tree.map(np.asarray, variables["params"])
        assert_close(y[0], mamba2_by_hand(p, np.asarray(x)[0], 0.4, 0.9), "float64")
    with pytest.raises(ValueError, match=r"dt_limit: got \(1.0, 0.5\)"):
        frugax.layers.Mamba2(heads=2, dt_limit=(1.0, 0.5)).init(jax.random.key(0), jnp.ones((1, 2, D)))


def test_limits_are_read_from_the_config(tmp_path):
    module, _ = load(tmp_path, CONFIG2 | {"time_step_limit": [0.001, 0.1]}, tensors(CONFIG2))
    assert dict(module.blocks[0].mixer_args)["dt_limit"] == (0.001, 0.1)
    endless = CONFIG2 | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    module, _ = load(tmp_path, endless, tensors(CONFIG2))
    assert dict(module.blocks[0].mixer_args)["dt_limit"] == (0.0, float("inf"))


def test_pickled_weights_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds pytorch_model.bin, which pickles code; expected model.safe"):
        frugax.layers.pretrained.load(tmp_path)


@pytest.mark.parametrize("config", [CONFIG, pytest.param(CONFIG2, marks=pytest.mark.full)], ids=["1", "2"])
def test_a_loaded_model_runs_packed(config, tmp_path):
    """Scanned layers and the tied embedding in 8 bits: the logits of the dequantized weights."""
    module, variables = load(tmp_path, config, tensors(config))
    rules = {"kernel$": ("int8", 6), "embedding": "int8"}
    packed, table = frugax.quant.quantize_params(variables["params"], rules)
    assert {row.path for row in table.arrays} >= {"embedding", "layers/block_0/mixer/out/kernel"}
    is_packed = lambda x: isinstance(x, frugax.formats.QuantizedTensor)  # noqa: E731
    arrays = jax.tree.map(lambda x: x.dequantize() if is_packed(x) else x, packed, is_leaf=is_packed)
    got, want = (logits(module, {"params": params}) for params in (packed, arrays))
    assert_close(got, want, "float32", times=4)
    assert 1e-4 < error(got, logits(module, variables)) < 0.2
