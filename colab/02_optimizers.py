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
# # Four optimizers, one model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/frugax/frugax/blob/main/colab/02_optimizers.ipynb)
#
# Adam keeps two numbers for each parameter, in 32 bits: as much memory again as two copies of the model.
# Three ideas need less, and this notebook trains one small language model with each of them, from the same
# start on the same data, in less than two minutes on two CPU cores.
#
# | optimizer | what it keeps for a matrix of $m \times n$, $m \le n$ |
# | --- | --- |
# | [Adam](https://arxiv.org/abs/1412.6980) | both moments, 32 bits each: $8mn$ bytes |
# | [8-bit Adam](https://arxiv.org/abs/2110.02861) | both moments in 8 bits: a little over $2mn$ bytes |
# | [GaLore](https://arxiv.org/abs/2403.03507) | a basis of rank $r$, moments in it: $4(mr + 2rn)$ bytes |
# | [APOLLO](https://arxiv.org/abs/2412.05270) | moments in a random basis, never stored: $8rn$ bytes |
#
# At the end one figure has the four loss curves, and one table the bytes.

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

# %% [markdown]
# ## The model and its data
#
# The model is a small Llama: attention over the last 64 bytes with rotary positions, gated linear units,
# RMS norms. It reads the source code of Python's standard library, byte by byte. `remat` computes each
# layer's activations again in the backward pass instead of keeping them, as large models do.

# %%
WIDTH, ROWS, LENGTH, STEPS = 144, 4, 64, 150

files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
random = np.random.default_rng(0)
starts = random.integers(0, len(text) - LENGTH, (STEPS, ROWS))
batches = [np.stack([text[i : i + LENGTH + 1] for i in rows]).astype(np.int32) for rows in starts]

block = frugax.layers.Block("SlidingWindowAttention", "GLU", {"heads": 4, "window": LENGTH})
model = frugax.layers.Decoder(256, WIDTH, (block,), repeats=4, remat=True, unroll=True)
initial = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
parameter_bytes = frugax.optim.state_bytes(initial)
print(f"{parameter_bytes // 4:,} parameters, {parameter_bytes / 1e6:.2f} MB")


# %%
def bits_per_byte(params, rows):
    logits, _ = model.apply({"params": params}, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean() / math.log(2)


# %% [markdown]
# ## The optimizers
#
# Each of them takes the place of `optax.adamw`: same calls, same schedules. The rank is a quarter of the
# width, as in the papers' small models, and GaLore and APOLLO look for new directions every 50 steps (200
# in the papers, whose runs are a thousand times longer). Adam's learning rate is the best of 0.001, 0.003
# and 0.01 for this run; those of GaLore and APOLLO are the best of three for a similar model.

# %%
RANK = WIDTH // 4


def schedule(peak):
    return optax.warmup_cosine_decay_schedule(0.0, peak, STEPS // 10, STEPS, end_value=peak / 10)


OPTIMIZERS = {
    "Adam": optax.adamw(schedule(3e-3), weight_decay=0.0),
    "8-bit Adam": frugax.optim.adamw_8bit(schedule(3e-3), weight_decay=0.0),
    "GaLore": frugax.optim.galore(schedule(1e-2), rank=RANK, update_interval=50),
    "APOLLO": frugax.optim.apollo(schedule(1e-2), rank=RANK, update_interval=50),
}

# %% [markdown]
# ## How much memory?
#
# Two numbers, and neither needs a run. `frugax.optim.state_bytes` adds up what the optimizer carries from
# step to step. The compiler knows the rest: `memory_analysis` of the compiled step says how many bytes go
# in, how many come out in new memory, and how many it needs on the way. Their sum is the peak of a step.
# Parameters and state are *donated*: their new values take the old ones' place.
#
# **Look for:** 8-bit Adam needs a quarter of Adam's state, GaLore and APOLLO at this rank a little more.
# The peak falls by as many megabytes but by a smaller share: it also holds parameters, gradients and
# activations.


# %%
def make_step(optimizer):
    def step(params, state, rows):
        loss, gradient = jax.value_and_grad(bits_per_byte)(params, rows)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


compiled, table = {}, {}
for name, optimizer in OPTIMIZERS.items():
    state = jax.eval_shape(optimizer.init, initial)
    compiled[name] = make_step(optimizer).lower(initial, state, batches[0]).compile()
    memory = compiled[name].memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    table[name] = {
        "state": frugax.optim.state_bytes(state),
        "peak": memory.argument_size_in_bytes + new + memory.temp_size_in_bytes,
    }

print(f"{'':12}{'state MB':>10}{'of Adam':>9}{'peak MB':>10}")
for name, row in table.items():
    share = row["state"] / table["Adam"]["state"]
    print(f"{name:12}{row['state'] / 1e6:10.2f}{share:9.0%}{row['peak'] / 1e6:10.2f}")

# %% [markdown]
# ## Does it learn as well?
#
# All four start from the same parameters and read the same batches in the same order.

# %%
losses = {}
for name, optimizer in OPTIMIZERS.items():
    params = jax.tree.map(jnp.copy, initial)  # a copy, because each step gives its memory away
    state = jax.jit(optimizer.init)(params)
    losses[name] = []
    for rows in tqdm(batches, desc=f"{name:10}", mininterval=1.0):
        params, state, loss = compiled[name](params, state, rows)
        losses[name].append(float(loss))

# %% [markdown]
# **Look for:** 8-bit Adam lies on Adam's curve, which is the point of it. GaLore and APOLLO take another
# path: with less state they are level with Adam or ahead of it in a run as short as this one. That is no
# ranking: 150 steps, one seed and one learning rate each. The grid of a longer run, with ten more methods,
# is in `experiments/benchmarks/results/optimizers_quality.json`.

# %%
figure, (curves, bytes_) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1), layout="constrained")
for i, (name, values) in enumerate(losses.items()):
    smooth = np.convolve(values, np.ones(10) / 10, "valid")
    curves.plot(np.arange(len(smooth)) + 9, smooth, color=f"C{i}", label=f"{name}: {smooth[-1]:.2f}")
    bytes_.bar(name, table[name]["state"] / 1e6, color=f"C{i}")
curves.set(title="Loss, mean of ten steps", xlabel="step", ylabel="bits per byte")
curves.legend()
bytes_.set(title="Optimizer state", ylabel="MB")
bytes_.axhline(parameter_bytes / 1e6, color="gray", linestyle=":", label="parameters")
bytes_.legend()
plt.show()

# %% [markdown]
# ## Where to go next
#
# - `frugax.optim` has more in the same form: `q_galore`, `fira`, `apollo_mini`, `lion_8bit`, `badam`,
#   `mezo_step` (which needs no gradient at all). `python -m frugax.papers optimizer` lists them.
# - The larger a model, the more of its memory is state: at 7 billion parameters Adam's two moments take 56
#   GB in 32 bits, those of 8-bit Adam 14 GB.
# - `experiments/configs/optimizers/llama_1m.py` is the longer run: one variant for each optimizer.
