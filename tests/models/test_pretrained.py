"""Checkpoints that `transformers` wrote, loaded here: the same logits, whole and token by token."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, D, DEPTH, PROMPT = 37, 20, 3, 23

MODELS = {
    "mamba": ("Mamba", {"state_size": 5, "conv_kernel": 3}),
    "mamba-untied": ("Mamba", {"time_step_rank": 3, "tie_word_embeddings": False, "use_conv_bias": False}),
    "falcon_mamba": ("FalconMamba", {"state_size": 5, "expand": 3, "mixer_rms_eps": 1e-3}),
    "mamba2": ("Mamba2", {"state_size": 6, "num_heads": 4, "head_dim": 10, "n_groups": 2, "chunk_size": 8}),
    "mamba2-limited": (
        "Mamba2",
        {"state_size": 6, "num_heads": 4, "head_dim": 10, "n_groups": 2, "chunk_size": 8}
        | {"time_step_limit": (0.3, 0.8), "tie_word_embeddings": True},
    ),
}


def build(name):
    """The model in torch, with weights that all matter: none is left at zero or one."""
    kind, more = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V, hidden_size=D, num_hidden_layers=DEPTH, layer_norm_epsilon=1e-3, **more
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in dict(model.named_parameters()).values():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: (torch's model, its folder)}; Mamba-2's in several files."""
    made = {}
    for name in MODELS:
        model, folder = build(name), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, max_shard_size="10KB" if name == "mamba2" else "5GB")
        made[name] = model, folder
    return made


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens(folders, name):
    theirs, folder = folders[name]
    module, variables = frugax.layers.pretrained.load(folder)
    tokens = np.random.default_rng(0).integers(V, size=(2, PROMPT))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
        steps = 12
        options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options["attention_mask"] = torch.ones(tokens.shape, dtype=torch.long)  # no token is padding
        chosen = theirs.generate(torch.tensor(tokens), **options).numpy()[:, PROMPT:]
    assert len(np.unique(chosen)) > 3, "a model that repeats itself tests little"

    apply = jax.jit(module.apply)
    logits, _ = apply(variables, jnp.asarray(tokens))
    # 1e-4 of float32: both libraries round, through three layers of exps and norms.
    assert np.abs(logits - want).max() < 1e-4 * np.abs(want).max()
    assert_close(logits, want, "float32")

    state, by_token = None, []
    for t in range(PROMPT):
        logits, state = apply(variables, jnp.asarray(tokens[:, t : t + 1]), state)
        by_token.append(logits[:, 0])
    assert np.abs(np.stack(by_token, axis=1) - want).max() < 1e-4 * np.abs(want).max()
    assert_close(np.stack(by_token, axis=1), want, "float32")

    if "limited" in name:
        return  # decoding there, unlike reading a prompt, leaves the limits out
    picked = []
    for _ in range(steps):
        picked.append(np.argmax(logits[:, -1], axis=-1))
        logits, state = apply(variables, jnp.asarray(picked[-1][:, None]), state)
    assert (np.stack(picked, axis=1) == chosen).all()


def test_a_file_in_half_precision_stays_so(folders, tmp_path):
    model, folder = folders["mamba2"]
    half = type(model)(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(tmp_path)
    module, variables = frugax.layers.pretrained.load(tmp_path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"bfloat16"}
    _, whole = frugax.layers.pretrained.load(folder)
    # Half a unit in the last place of every weight.
    assert_close(variables, whole, "bfloat16")
    assert module.apply(variables, jnp.ones((1, 3), jnp.int32))[0].dtype == jnp.float32


def rewrite(folder, tmp_path, change, config=None):
    """A copy of the folder whose tensors and config went through `change`."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


def test_wrong_tensors_are_listed_all(folders, tmp_path):
    def change(tensors):
        del tensors["backbone.norm_f.weight"]
        tensors["backbone.layers.0.mixer.extra"] = np.ones(3)
        tensors["backbone.layers.1.mixer.skip"] = tensors.pop("backbone.layers.1.mixer.D")  # misnamed
        tensors["backbone.layers.2.mixer.x_proj.weight"] = np.ones((4, 4))

    folder = rewrite(folders["mamba"][1], tmp_path, change)
    with pytest.raises(ValueError, match=r"does not hold what its config.json says") as error:
        frugax.layers.pretrained.load(folder)
    lines = str(error.value).splitlines()[1:]
    assert lines[0].split(": ")[0].strip() == "missing"
    assert set(lines[0].split(": ")[1].split(", ")) == {"backbone.norm_f.weight", "backbone.layers.1.mixer.D"}
    assert lines[1] == "  unexpected: backbone.layers.0.mixer.extra, backbone.layers.1.mixer.skip"
    assert lines[2] == "  misshaped: backbone.layers.2.mixer.x_proj.weight [4, 4] (expected [12, 40])"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "mamba",
            {"model_type": "llama"},
            "model_type: got 'llama'; expected one of 'mamba', 'falcon_mamba', 'mamba2'",
        ),
        ("mamba", {"hidden_act": "gelu"}, "hidden_act: got 'gelu'; expected 'silu' or 'swish'"),
        ("mamba", {"use_bias": True}, "use_bias: got True; expected False"),
        ("mamba", {"num_hidden_layers": 4}, "missing: backbone.layers.3.norm.weight, "),
        ("mamba", {"num_hidden_layers": 2}, "unexpected: backbone.layers.2.mixer.A_log, "),
        ("mamba", {"tie_word_embeddings": False}, "missing: lm_head.weight$"),
        ("mamba2", {"head_dim": 12}, "head_dim: got 12; expected expand . hidden_size / num_heads = 10"),
    ],
)
def test_settings_that_do_not_fit(folders, tmp_path, name, config, message):
    # Mamba-2's settings are read before its tensors: any will do.
    folder = rewrite(folders["mamba"][1], tmp_path, lambda tensors: None)
    settings = json.loads((folders[name][1] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    with pytest.raises(ValueError, match=message):
        frugax.layers.pretrained.load(folder)


def test_files_that_are_not_there(folders, tmp_path):
    with pytest.raises(ValueError, match=r"without a config.json"):
        frugax.layers.pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text((folders["mamba2"][1] / "config.json").read_text())
    with pytest.raises(ValueError, match=r"lacks model.safetensors$"):
        frugax.layers.pretrained.load(tmp_path)
    index = folders["mamba2"][1] / "model.safetensors.index.json"
    (tmp_path / index.name).write_text(index.read_text())
    with pytest.raises(ValueError, match=r"lacks model-00001-of-.*, model-00002-of"):
        frugax.layers.pretrained.load(tmp_path)


def test_without_safetensors(folders):
    code = (
        "import sys; sys.modules['safetensors'] = None; import frugax.layers; "
        f"frugax.layers.pretrained.load({str(folders['mamba'][1])!r})"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: loading a checkpoint needs safetensors" in process.stderr
