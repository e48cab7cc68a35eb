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
# # From a laptop to a pod
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/frugax/frugax/blob/main/colab/06_laptop_to_pod.ipynb)
#
# A training step is one function. This notebook runs it on the machine at hand, and then asks the compiler of
# a TPU v5p what the same function, with a model of half a billion params, would take of eight chips that are
# not here. It takes about three minutes on two CPU cores:
#
# 1. a small model takes some steps on this machine;
# 2. a *mesh* says how eight chips share the large one;
# 3. the step is compiled for them, and its *plan* read off: bytes, messages, time, and one figure of memory;
# 4. one argument is changed, and planned again.
#
# The first cell installs the library, and the TPU's compiler, where they are not there yet.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("frugax") is None or importlib.util.find_spec("libtpu") is None:
    packages = ["frugax @ git+https://github.com/frugax/frugax", "libtpu", "matplotlib", "tqdm"]
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", *packages])

# %%
import pathlib
import sysconfig
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import frugax

print(f"frugax {frugax.__version__}, jax {jax.__version__} on {jax.devices()[0].device_kind}")

# %% [markdown]
# ## 1. A step, here
#
# A decoder of gated linear attention, AdamW, and the bytes of Python's own sources.
#
# **Look for:** `step` knows nothing of devices.


# %%
def build(width, layers, vocabulary, remat="none", dtype=jnp.float32):
    block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 4}, {"expand": 2.75})
    return frugax.layers.Decoder(
        vocabulary, width, (block,), layers, tie_embeddings=False, remat=remat, dtype=dtype
    )


optimizer = optax.adamw(3e-3)


def make_step(model):
    def loss_of(params, rows):
        logits, _ = model.apply({"params": params}, rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    def step(params, state, rows):
        loss, grads = jax.value_and_grad(loss_of)(params, rows)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


# %%
text = b"".join(
    path.read_bytes() for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("a*.py"))
)
text = np.frombuffer(text, np.uint8)
small = build(64, 2, 256)
params = small.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
state = optimizer.init(params)
step = jax.jit(make_step(small), donate_argnums=(0, 1))
rng, losses = np.random.default_rng(0), []
for _ in tqdm(range(60)):
    starts = rng.integers(len(text) - 129, size=8)
    rows = np.stack([text[start : start + 129] for start in starts]).astype(np.int32)
    params, state, loss = step(params, state, rows)
    losses.append(float(loss))
print(f"nats a byte: {losses[0]:.2f}, after 60 steps {np.mean(losses[-5:]):.2f}")

# %% [markdown]
# ## 2. A mesh of chips that are not here
#
# `topology` names devices of a kind; `make_mesh` lays them out. Here all eight share the params ("fsdp"):
# each keeps an eighth of every array, and all of one layer for the moment that it is needed ([ZeRO, arXiv
# 1910.02054](https://arxiv.org/abs/1910.02054)). The table has a line for each array: its shape, what its
# dimensions are, and the mesh axis that splits each.

# %%
pod = frugax.planner.topology("v5p:2x2x2")
mesh = frugax.parallel.make_mesh(data=1, fsdp=8, devices=pod.devices)
large = build(1536, 16, 32_000, remat="none", dtype=jnp.bfloat16)
shapes = jax.eval_shape(large.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
print(f"{sum(x.size for x in jax.tree.leaves(shapes)) / 1e9:.2f} billion params\n")
print(frugax.parallel.table(shapes, mesh))

# %% [markdown]
# ## 3. The plan
#
# The step is compiled by the TPU's own compiler for shapes with places, without data. What it takes is read
# off the program: bytes of a chip by kind, bytes sent, the compiler's estimate of time with a simple model
# of links, and the share of the chips' peak that the model's own products would be (MFU). It is an
# estimate: nothing ran.


# %%
def plan(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

    def placed(tree, places):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
        )

    params = placed(shapes, frugax.parallel.shardings(shapes, mesh))
    state = jax.eval_shape(optimizer.init, shapes)
    state = placed(state, frugax.parallel.state_shardings(state, shapes, mesh))
    by_row = jax.NamedSharding(mesh, jax.P("fsdp"))
    rows = jax.ShapeDtypeStruct((32, 2049), jnp.int32, sharding=by_row)
    step = make_step(model)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        executed = frugax.planner.flops(step, params, state, rows)
        forward = frugax.planner.flops(lambda p, t: model.apply({"params": p}, t[:, :-1])[0], params, rows)
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, rows).compile(options)
        dumped = list(pathlib.Path(folder).glob("*jit_step*after_codegen.txt"))
        return frugax.planner.plan(
            compiled,
            topology=pod,
            mesh=mesh,
            arguments={"params": params, "optimizer": state, "batch": rows},
            gradients=params,
            executed=executed,
            model_flops=3 * forward.total,  # the pass back is two more
            text=dumped[0].read_text() if dumped else "",
        )


whole = plan(large)
print(whole.table())

# %% [markdown]
# **Look for:** in the figure, activations grow while the forward pass walks up the layers, and shrink on
# the way back; the peak is between. The bytes are those of temporaries, over the program's schedule with
# each loop once.


# %%
def draw(axis, made, title):
    kinds = list(made.points[0].bytes)
    heights = [[point.bytes[kind] / 2**30 for point in made.points] for kind in kinds]
    axis.stackplot(range(len(made.points)), heights, labels=kinds)
    constant = (made.bytes["params"] + made.bytes["optimizer"]) / 2**30
    axis.set(title=f"{title}: {made.total / 2**30:.1f} GiB a chip", xlabel="instruction of the schedule")
    axis.text(0.02, 0.9, f"+ {constant:.1f} GiB of params and moments", transform=axis.transAxes)


figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
draw(axes[0], whole, "everything kept")

# %% [markdown]
# ## 4. One argument later
#
# `remat="full"` keeps each layer's input alone, and computes the rest again on the way back: more operations,
# less memory. `python -m experiments.plan` does all this for a config, and `--search` looks for a mesh.

# %%
again = plan(build(1536, 16, 32_000, remat="full", dtype=jnp.bfloat16))
draw(axes[1], again, "computed again")
axes[0].set_ylabel("GiB of temporaries")
axes[1].legend(loc="upper right")
plt.show()
for name, made in {"everything kept": whole, "computed again": again}.items():
    seconds = 1e3 * made.times.step
    print(f"{name:16} {made.total / 2**30:5.1f} GiB a chip, {seconds:5.0f} ms a step, MFU {made.mfu:.0%}")
