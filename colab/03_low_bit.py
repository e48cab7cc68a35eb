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
# # Few bits
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/frugax/frugax/blob/main/colab/03_low_bit.ipynb)
#
# Weights are trained in 32 or 16 bits and can be kept in far fewer. This notebook takes two minutes on two
# CPU cores. It trains a small language model, stores it in 8, 4, 3 and 2 bits, and shows what breaks:
#
# 1. a *format* is a set of values and a rule for scales: what it does to one matrix;
# 2. a whole model, packed, runs by the same call, in fewer bytes;
# 3. GPTQ rounds with an eye on the data: one figure of bits per byte over bytes.
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
# ## 1. What a format does to numbers
#
# A format has codes, each of which stands for a value, and a scale for every group of them. Weights are
# nearly normally distributed, so the question is where a format puts its 16 values of 4 bits. `int4` spaces
# them evenly, `nf4` at quantiles of the normal distribution, `mxfp4` and `nvfp4` as small floating-point
# numbers; the last two keep their scales in 8 bits as well.
#
# **Look for:** one bit less doubles the error, whatever the format; at equal bits the formats differ by some
# tens of percent.

# %%
x = jax.random.normal(jax.random.key(0), (1024, 256))
print("format  bits a weight  relative error")
for name, group in (
    ("int8", 64),
    ("int4", 64),
    ("nf4", 64),
    ("mxfp4", 32),
    ("nvfp4", 16),
    ("int3", 64),
    ("int2", 64),
):
    q = frugax.formats.quantize(x, name, group_size=group)
    error = jnp.sqrt(jnp.mean((q.dequantize() - x) ** 2) / jnp.mean(x**2))
    print(f"{name:7} {8 * q.nbytes / x.size:12.2f}  {float(error):14.4f}")

# %% [markdown]
# ## 2. A model to break
#
# Gated linear attention learns the source code of Python's own standard library, byte by byte, as in
# `01_start_here`. The loss is in *bits per byte*; knowing nothing costs 8.

# %%
files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = {True: b"", False: b""}
for number, file in enumerate(files):
    text[number % 20 == 10] += file.read_bytes()
train, held_out = (np.frombuffer(text[held], np.uint8) for held in (False, True))

block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 2, "conv_width": 4}, {"expand": 2.0})
model = frugax.layers.Decoder(
    vocab_size=256, width=96, blocks=(block,), repeats=3, tie_embeddings=False, unroll=True
)
params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters")

# %%
STEPS, ROWS, LENGTH = 400, 8, 128
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


random = np.random.default_rng(0)
optimizer_state = optimizer.init(params)
with tqdm(range(STEPS), mininterval=1.0) as bar:
    for _ in bar:
        params, optimizer_state, loss = step(params, optimizer_state, draw(train, random))
        bar.set_postfix_str(f"{float(loss):.2f} bits per byte", refresh=False)

# %% [markdown]
# `quantize_params` packs every matrix that a rule names, and returns a table of bytes and errors. Rules are
# regular expressions on the paths of the params. The packed tree goes where the params went: layers find a
# packed matrix and multiply by `frugax.kernels.quantized_matmul`, without ever making it whole.
#
# **Look for:** matrices take a sixth of their bytes, scales included; norms and convolutions, which no rule
# names, stay.

# %%
packed, table = frugax.quant.quantize_params(params, {"kernel$": ("int4", 32), "embedding$|head$": "int8"})
print(table)

# %%
test_rows = draw(held_out, np.random.default_rng(1), rows=64)
score = jax.jit(bits_per_byte)
for name, tree in (("float32", params), ("packed", packed)):
    print(f"{name:8} {float(score(tree, test_rows)):.3f} bits per byte")

# %% [markdown]
# ## 3. What breaks, and what GPTQ saves
#
# Rounding to the nearest treats every weight alike. GPTQ looks at the inputs $X$ that a matrix $W$ really
# gets and makes $\|XW - XQ\|$ small: it rounds row by row, and the rows that are left make up for the error
# ([arXiv 2210.17323](https://arxiv.org/abs/2210.17323)). `calibrate` gathers what it needs from a few
# batches; no labels, no gradients.

# %%
calibration = [draw(train, np.random.default_rng(2), rows=32)[:, :-1] for _ in range(4)]
statistics = frugax.quant.calibrate(model, {"params": params}, calibration)


def nearest(format):
    return lambda path, w: frugax.formats.quantize(w, format, axis=-2, group_size=32)


def gptq(format):
    return lambda path, w: frugax.quant.gptq(w, statistics[path], format, group_size=32)


def pack(rounding, format):
    return frugax.quant.quantize_params(params, {"kernel$": rounding(format), "embedding$|head$": "int8"})[0]


def size_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# %%
points = {"nearest": [], "gptq": []}
for bits in (8, 4, 3, 2):
    for name, rounding in (("nearest", nearest), ("gptq", gptq)):
        tree = pack(rounding, f"int{bits}")
        points[name].append((size_of(tree), float(score(tree, test_rows))))
        print(f"int{bits} {name:8} {points[name][-1][0]:9,} bytes  {points[name][-1][1]:.3f} bits per byte")

# %% [markdown]
# **Look for:** 8 bits cost nothing and 4 almost nothing; below, every bit costs several times as much as the
# one before. GPTQ takes back a good part of what rounding to the nearest loses.

# %%
plt.figure(figsize=(7, 4))
for name, line in points.items():
    plt.plot(*zip(*line, strict=True), "o-", label=name)
for bits, (size, loss) in zip((8, 4, 3, 2), points["nearest"], strict=True):
    plt.annotate(f"int{bits}", (size, loss), textcoords="offset points", xytext=(5, 5))
plt.axhline(
    float(score(params, test_rows)), color="gray", linestyle=":", label=f"float32, {size_of(params):,} bytes"
)
plt.xlabel("bytes of params")
plt.ylabel("held-out bits per byte")
plt.legend()
plt.show()

# %% [markdown]
# ## Where to go next
#
# - `frugax.formats` has more formats: `nf4`, `mxfp4`, `nvfp4`, minifloats of any split, your own codebooks.
# - `python -m experiments.studies.low_bit --run=RUN` makes the whole table for a model that you trained, with
#   AWQ and the speed of decoding.
# - `python -m frugax.papers quantiz` finds a method by a word of its name, and says how to call it.
