"""The configs of the package mamba_ssm, as those of `transformers`."""

import math


def from_state_spaces(config: dict) -> dict:
    """The config in the words of `transformers`.

    Raises:
      ValueError: a setting that has no counterpart here, such as layers of attention.
    """
    ssm = dict(config.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    for name, known in {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}.items():
        if (config.get(name) or known) != known:
            raise ValueError(f"{name}: got {config[name]!r}; expected {known!r}")
    width, multiple = config["d_model"], config.get("pad_vocab_size_multiple", 8)
    expand = ssm.pop("expand", 2)
    ours = {
        "hidden_size": width,
        "num_hidden_layers": config["n_layer"],
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "layer_norm_epsilon": config.get("norm_epsilon", 1e-5),
        "expand": expand,
        "conv_kernel": ssm.pop("d_conv", 4),
        "use_conv_bias": ssm.pop("conv_bias", True),
        "use_bias": ssm.pop("bias", False),
    }
    if layer == "Mamba1":
        ours |= {
            "model_type": "mamba",
            "state_size": ssm.pop("d_state", 16),
            "time_step_rank": ssm.pop("dt_rank", "auto"),
        }
    elif layer == "Mamba2":
        size = ssm.pop("headdim", 64)
        ours |= {
            "model_type": "mamba2",
            "state_size": ssm.pop("d_state", 128),
            "head_dim": size,
            "num_heads": expand * width // size,
            "n_groups": ssm.pop("ngroups", 1),
            "time_step_limit": ssm.pop("dt_limit", (0.0, math.inf)),
            "norm_before_gate": ssm.pop("norm_before_gate", False),
        }
    else:
        raise ValueError(f"ssm_cfg.layer: got {layer!r}; expected 'Mamba1' or 'Mamba2'")
    # What is left is said of training or of kernels, but for these.
    for name, known in {"rmsnorm": True, "D_has_hdim": False, "d_ssm": None}.items():
        if ssm.get(name, known) != known:
            raise ValueError(f"ssm_cfg.{name}: got {ssm[name]!r}; expected {known!r}")
    return ours
