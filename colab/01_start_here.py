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
# # Start here
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/frugax/frugax/blob/main/colab/01_start_here.ipynb)
#
# `frugax` is a JAX library of sequence models whose memory does not grow with the length of the text. This
# notebook takes one to two minutes on two CPU cores and shows three things:
#
# 1. one function call that runs a different kernel on each chip, and how to see which;
# 2. a small language model that learns to write Python in less than a minute;
# 3. the same model writing text token by token with a state of constant size.
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
import gzip
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
# ## 1. One call on three chips
#
# Linear attention keeps one matrix $S$ per head instead of a cache of keys and values. With a gate, each
# channel of the matrix also forgets (Gated Linear Attention, [arXiv
# 2312.06635](https://arxiv.org/abs/2312.06635)):
#
# $$S_t = \mathrm{diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top, \qquad o_t = S_t^\top q_t / \sqrt{K}.$$
#
# The function takes queries, keys, values and the log of the gate, and returns the outputs and the last
# $S$.
#
# **Look for:** the state has no time axis. It is as large after 128 tokens as after a million.

# %%
batch, time, heads, channels = 1, 128, 2, 64
keys = jax.random.split(jax.random.key(0), 4)
q, k, v = (jax.random.normal(key, (batch, time, heads, channels), jnp.bfloat16) for key in keys[:3])
gate = jax.nn.log_sigmoid(jax.random.normal(keys[3], q.shape, jnp.bfloat16))

out, state = frugax.kernels.linear_attention(q, k, v, gate)
print("outputs", out.shape, out.dtype)
print("state  ", state.shape, state.dtype)

# %% [markdown]
# Nothing above named a chip. The choice is made when a program is compiled: a Pallas kernel on TPU, another
# one on Hopper GPUs, and plain JAX in a chunked form everywhere else. `explain` says what would run where,
# and why.

# %%
_ = frugax.kernels.explain("linear_attention", q, k, v, gate)

# %% [markdown]
# We need neither chip to see that this is so. `jax.export` compiles the same Python function for each
# platform, here on whatever machine you are on. A Pallas kernel appears in the program as a *custom call*.
#
# **Look for:** `tpu_custom_call` in the program for TPU, `mosaic_gpu` in the one for CUDA, neither for CPU.

# %%
KERNEL_CALLS = ("tpu_custom_call", "mosaic_gpu_v2", "mosaic_gpu")
allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in KERNEL_CALLS]


@jax.jit
def attend(q, k, v, gate):
    return frugax.kernels.linear_attention(q, k, v, gate)[0]


for platform in ("cpu", "tpu", "cuda"):
    export = jax.export.export(attend, platforms=[platform], disabled_checks=allowed)
    program = export(q, k, v, gate).mlir_module()
    found = [name for name in ("tpu_custom_call", "mosaic_gpu") if name in program]
    kernel = ", ".join(found) or "none (plain JAX)"
    print(f"{platform:5} {len(program) / 1000:6.1f} kB of program, kernel: {kernel}")

# %% [markdown]
# ## 2. A small language model
#
# The text is the source code of Python's own standard library, read byte by byte, so there is nothing to
# download and no tokenizer to train. One file in twenty is held out.

# %%
files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = {True: b"", False: b""}
for number, file in enumerate(files):
    text[number % 20 == 10] += file.read_bytes()
train, held_out = (np.frombuffer(text[held], np.uint8) for held in (False, True))
print(f"{len(train):,} bytes to learn from, {len(held_out):,} held out")

# %% [markdown]
# A model is assembled from data. A `Block` names a mixer over time (gated linear attention) and one over
# channels (a gated linear unit); `Decoder` repeats the block. Change `"GatedLinearAttention"` to
# `"Mamba2"`, `"RWKV6"` or `"Retention"`, and everything below runs unchanged.

# %%
block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 2, "conv_width": 4}, {"expand": 2.0})
model = frugax.layers.Decoder(
    vocab_size=256, width=96, blocks=(block,), repeats=3, tie_embeddings=False, unroll=True
)
params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# The training step is ordinary Flax and Optax. The loss is in *bits per byte*: the average number of bits
# that the model needs to encode the next byte. Knowing nothing costs 8.

# %%
STEPS, ROWS, LENGTH = 500, 8, 128
rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, STEPS // 10, STEPS)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95))


def bits_per_byte(params, rows):
    logits, _ = model.apply({"params": params}, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean() / math.log(2)


@jax.jit
def step(params, optimizer_state, rows):
    loss, gradient = jax.value_and_grad(bits_per_byte)(params, rows)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, loss


def draw(text, random, rows=ROWS):
    """Random stretches of the text, one byte longer than what the model reads."""
    starts = random.integers(0, len(text) - LENGTH, rows)
    return np.stack([text[start : start + LENGTH + 1] for start in starts]).astype(np.int32)


# %%
random, losses = np.random.default_rng(0), []
optimizer_state = optimizer.init(params)
with tqdm(range(STEPS), mininterval=1.0) as bar:
    for _ in bar:
        params, optimizer_state, loss = step(params, optimizer_state, draw(train, random))
        losses.append(float(loss))
        bar.set_postfix_str(f"{losses[-1]:.2f} bits per byte", refresh=False)

# %% [markdown]
# Two numbers to read the curve beside: the model on files that it has never seen, and `gzip -9` on the same
# files.
#
# **Look for:** the loss falls fast to about 4 (which bytes are common), then slowly (words, indentation,
# syntax). After a minute the model is still worse than gzip, which may look back over 32 kB where the model
# has seen rows of 128 bytes; `experiments/configs/lm/python_25min.py` trains for long enough to beat it.

# %%
test_rows = draw(held_out, np.random.default_rng(1), rows=64)
held_out_bits = float(jax.jit(bits_per_byte)(params, test_rows))
gzip_bits = 8 * len(gzip.compress(held_out.tobytes(), 9)) / len(held_out)

plt.figure(figsize=(7, 3.5))
plt.plot(losses, label="training")
plt.axhline(held_out_bits, color="C1", label=f"held out: {held_out_bits:.2f}")
plt.axhline(gzip_bits, color="gray", linestyle=":", label=f"gzip -9: {gzip_bits:.2f}")
plt.xlabel("step")
plt.ylabel("bits per byte")
plt.ylim(0, 8)
plt.legend()
plt.show()

# %% [markdown]
# ## 3. Token by token, in constant memory
#
# The same call trains, reads a prompt and generates. It takes the state of the last call and returns the
# next one: a whole prompt at once, then one token at a time.
#
# First a check. Reading 64 bytes in one call, and reading them one at a time with the state handed on, give
# the same predictions up to rounding.

# %%
apply = jax.jit(model.apply)
variables = {"params": params}
some = jnp.asarray(test_rows[:1, :64])
whole, _ = apply(variables, some)
state, one_by_one = None, []
for t in range(some.shape[1]):
    logits, state = apply(variables, some[:, t : t + 1], state)
    one_by_one.append(logits)
difference = float(jnp.abs(jnp.concatenate(one_by_one, axis=1) - whole).max())
print(f"largest difference of a logit: {difference:.1e}")

# %% [markdown]
# Now the model writes. A Transformer's cache of keys and values would grow by one entry per layer and
# token.
#
# **Look for:** the same number of bytes after the prompt and after 300 more tokens.


# %%
def state_bytes(state):
    return sum(x.nbytes for x in jax.tree.leaves(state))


@jax.jit
def next_token(variables, token, state, key):
    logits, state = model.apply(variables, token[None, None], state)
    return jax.random.categorical(key, logits[0, -1] / 0.7), state


prompt = b"def read(self):\n    "
logits, state = apply(variables, jnp.frombuffer(prompt, jnp.uint8).astype(jnp.int32)[None])
token, written = logits[0, -1].argmax(), []
print(f"after the prompt of {len(prompt)} tokens the state has {state_bytes(state):,} bytes")
for key in jax.random.split(jax.random.key(2), 300):
    written.append(int(token))
    token, state = next_token(variables, token, state, key)
print(f"after {len(prompt) + len(written)} tokens it has {state_bytes(state):,} bytes\n")
print((prompt + bytes(written)).decode("utf-8", errors="replace"))

# %% [markdown]
# ## Where to go next
#
# - `02_optimizers` trains one model with four optimizers and compares the memory that each needs.
# - `python -m experiments.train --config=experiments/configs/lm/quickstart.py` is this notebook grown up:
#   packed documents, checkpoints, evaluation over all held-out files, several devices.
# - `python -m frugax.papers gated` finds a method by a word of its name, and says how to call it.
