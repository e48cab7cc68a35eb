# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Experts
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/frugax/frugax/blob/main/colab/04_experts.ipynb)
#
# A *mixture of experts* has many small networks where a language model has one, and a *router* that sends
# each token to a few of them: more parameters, the same work a token. This notebook takes three minutes on
# two CPU cores:
#
# 1. a router is a function from scores to assignments, and experts are matrices that multiply their own rows;
# 2. a model with eight experts a layer learns to write Python, with and without a loss that balances them;
# 3. one figure of the experts' loads over training, and one table of what balance costs and saves.
#
# The first cell installs the library where it is not there yet.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("frugax") is None:
    packages = ["frugax @ git+https://github.com/frugax/frugax", "matplotlib", "tqdm"]
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", *packages])

# %%
import math
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import frugax

print(f"frugax {frugax.__version__}, jax {jax.__version__} on {jax.devices()[0].device_kind}")

# %% [markdown]
# ## 1. Routing by hand
#
# Six tokens, three experts, two of them for each token. `softmax_top_k` turns scores into *assignments*;
# `dispatch` sorts the tokens by expert; `grouped_matmul` multiplies each group by its expert's matrix; and
# `combine` adds up what the experts made of each token, times the router's weights.
#
# **Look for:** the experts' groups have any sizes, nothing is padded and nothing is dropped.

# %%
tokens = jax.random.normal(jax.random.key(0), (6, 4))
scores = tokens @ jax.random.normal(jax.random.key(1), (4, 3))
experts = jax.random.normal(jax.random.key(2), (3, 4, 4))

routing = frugax.moe.softmax_top_k(scores, 2)
print("experts of each token:", routing.indices.tolist())
rows, plan = frugax.moe.dispatch(tokens, routing)
print("rows of each expert:", plan.group_sizes.tolist())
mixed = frugax.moe.combine(frugax.kernels.grouped_matmul(rows, experts, plan.group_sizes), plan)

by_hand = sum(
    routing.weights[:, [i]] * jnp.einsum("td,tdh->th", tokens, experts[routing.indices[:, i]]) for i in (0, 1)
)
print("the same by hand:", bool(jnp.allclose(mixed, by_hand, atol=1e-5)))

# %% [markdown]
# ## 2. A model with experts
#
# `MoE` is a channel mixer like any other: a block takes it by name. The collection "moe" holds what a layer
# reports: a loss to add, and statistics of its loads. Without a balancing loss a router likes the experts
# that it chose before, which then learn more, and so on; `load_balance` makes an expert's load dear where
# its scores are high ([arXiv 2101.03961](https://arxiv.org/abs/2101.03961)).

# %%
files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = {True: b"", False: b""}
for number, file in enumerate(files):
    text[number % 20 == 10] += file.read_bytes()
train, held_out = (np.frombuffer(text[held], np.uint8) for held in (False, True))


def build(balance):
    losses = {"load_balance": balance, "z": 1e-3}
    block = frugax.layers.Block(
        "MLGRU", "MoE", (), {"experts": 8, "k": 2, "expand": 0.75, "loss_weights": losses}
    )
    return frugax.layers.Decoder(vocab_size=256, width=64, blocks=(block,), repeats=2, tie_embeddings=False)


def build_dense():
    """As much work a token: one network as wide as two experts."""
    block = frugax.layers.Block("MLGRU", "GLU", (), {"expand": 1.5})
    return frugax.layers.Decoder(vocab_size=256, width=64, blocks=(block,), repeats=2, tie_embeddings=False)


# %%
STEPS, ROWS, LENGTH = 300, 8, 128
rate = optax.warmup_cosine_decay_schedule(0.0, 6e-3, STEPS // 10, STEPS)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95))


def draw(text, random, rows=ROWS):
    """Random stretches of the text, one byte longer than what the model reads."""
    starts = random.integers(0, len(text) - LENGTH, rows)
    return np.stack([text[start : start + LENGTH + 1] for start in starts]).astype(np.int32)


test_rows = draw(held_out, np.random.default_rng(1), rows=64)


def run(name, model):
    """Train; return held-out bits per byte, loads [steps, layers, experts] and the number of parameters."""

    def loss_of(params, rows):
        (logits, _), reports = model.apply({"params": params}, rows[:, :-1], mutable=["moe"])
        bits = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean() / math.log(2)
        load = jnp.zeros((2, 1))
        if "moe" in reports:
            load = reports["moe"]["layers"]["block_0"]["channel"]["statistics"]["routing"].load
        return bits + frugax.moe.total_loss(reports), (bits, load)

    @jax.jit
    def step(params, optimizer_state, rows):
        (_, seen), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, rows)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, seen

    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    optimizer_state, random, loads = optimizer.init(params), np.random.default_rng(0), []
    with tqdm(range(STEPS), desc=name, mininterval=1.0) as bar:
        for _ in bar:
            params, optimizer_state, (bits, load) = step(params, optimizer_state, draw(train, random))
            loads.append(load)
            bar.set_postfix_str(f"{float(bits):.2f} bits per byte", refresh=False)
    bits = jax.jit(loss_of)(params, test_rows)[1][0]
    return float(bits), np.stack(loads), sum(p.size for p in jax.tree.leaves(params))


# %%
runs = {
    "balanced": run("balanced", build(1e-2)),
    "not balanced": run("not balanced", build(0.0)),
    "dense": run("dense", build_dense()),
}

# %% [markdown]
# ## 3. Loads over training
#
# Each line is one expert of the second layer: its share of all assignments. An even share is one eighth.
#
# **Look for:** with the balancing loss the lines stay together; without it a few experts take most tokens.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
for axis, name in zip(axes, ("balanced", "not balanced"), strict=True):
    axis.plot(runs[name][1][:, 1])
    axis.axhline(1 / 8, color="gray", linestyle=":")
    axis.set_title(name)
    axis.set_xlabel("step")
axes[0].set_ylabel("share of assignments")
plt.show()

# %% [markdown]
# **Look for:** the mixtures have fewer bits per byte than the dense model of the same work a token. The last
# column is what evenness is for: where experts lie on eight devices, the busiest one decides how long a step
# takes.

# %%
print("              parameters  bits per byte  busiest expert's load over the mean")
for name, (bits, loads, parameters) in runs.items():
    busiest = f"{8 * loads[-50:].mean(0).max():.2f}" if loads.shape[-1] > 1 else ""
    print(f"{name:13} {parameters:11,} {bits:14.3f}  {busiest}")

# %% [markdown]
# ## Where to go next
#
# - `frugax.moe` has more routers: `sigmoid_top_k` balances by a bias instead of a loss, `expert_choice` lets
#   experts choose, `relu_route` (BlockFFN) lets the number of experts vary by token.
# - `python -m experiments.studies.moe_routers` makes a table over routers, and
#   `experiments/configs/moe/moe_bytes.py` is a longer run beside its dense twin.
# - `frugax.parallel.expert_parallel` sends tokens to experts on other devices and back.
