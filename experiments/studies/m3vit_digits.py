"""Do routers by task help an encoder that several tasks share, at the same work for a task?

  python -m experiments.studies.m3vit_digits                   minutes a model on a core; writes the JSON
  python -m experiments.studies.m3vit_digits --smoke           seconds, and writes nothing

Three tasks on scikit-learn's digits, seen through noise that is drawn anew in each batch: which digit, above
four or not, and the edges of the clean image (the length of its gradient at each pixel). Four encoders of the
same work for one task: `M3ViT` with routers by task, with one router that reads an embedding of the task, an
encoder with MLPs that all tasks share, and such an encoder for each task alone. The mean difference is that
of M3ViT's paper: over tasks, relative to the encoders of one task each.

Models that the JSON has are not trained again.

Source: Liang et al. 2022 (arXiv 2210.14793), at a scale that a CPU has.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from experiments.benchmarks.interleaved import about
from experiments.data import examples
from frugax.layers import Dense, LinearAttention
from frugax.models import M3ViT
from frugax.moe import total_loss

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "m3vit_digits.json"
TASKS = ("digit", "above four", "edges")
OUTPUTS = (10, 2, 4)  # of the heads; edges of each of a patch's pixels
PATCH, BATCH, NOISE, RATE = 2, 32, 0.5, 5e-3
SHAPE: dict[str, Any] = dict(tasks=3, width=32, pairs=2, patch=PATCH, mlp_expand=4)
EXPERTS: dict[str, Any] = {"experts": 16, "k": 4}
MODELS: dict[str, dict[str, Any]] = {
    "routers by task": {"moe_args": EXPERTS, "gate": "router"},
    "one router, task embedding": {"moe_args": EXPERTS, "gate": "embedding"},
    "shared encoder": {"moe_args": None},
    "an encoder for each task": {"moe_args": None},
}


class Heads(nn.Module):
    """An encoder and its tasks' heads: images -> classes' scores, or what is predicted of each pixel."""

    encoder: M3ViT

    @nn.compact
    def __call__(self, x: Array, task: int) -> Array:
        tokens = self.encoder(x, task)
        heads = [Dense(n, name=f"head_{i}") for i, n in enumerate(OUTPUTS)]
        if self.is_initializing():
            for head in heads:
                head(tokens)
        return heads[task](tokens if TASKS[task] == "edges" else tokens.mean(1))


def edges(images: Array) -> Array:
    """The length of the gradient at each pixel of [B, 8, 8, 1], patch by patch [B, 16, 4]."""
    down, right = (
        jnp.diff(images, axis=axis, append=jnp.take(images, jnp.array([-1]), axis)) for axis in (1, 2)
    )
    length = jnp.sqrt(down**2 + right**2 + 1e-6)[..., 0]
    B, H, W = length.shape
    patches = length.reshape(B, H // PATCH, PATCH, W // PATCH, PATCH).swapaxes(2, 3)
    return patches.reshape(B, -1, PATCH * PATCH)


def loss_of(task: int, outputs: Array, images: Array, labels: Array) -> Array:
    """Cross entropy, or for edges the mean square error."""
    if TASKS[task] == "edges":
        return jnp.mean((outputs - edges(images)) ** 2)
    wanted = labels if TASKS[task] == "digit" else (labels > 4).astype(int)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, wanted).mean()


def noisy(images: Array, key: Array) -> Array:
    """The images as encoders see them."""
    return images + NOISE * jax.random.normal(key, images.shape)


def training(model: Heads, tasks: tuple[int, ...], data: examples.Examples, steps: int) -> Any:
    """Make the function from a seed to params, trained on the sum of the tasks' losses."""
    images, labels = jnp.asarray(data.inputs), jnp.asarray(data.labels)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps), weight_decay=0.01),
    )

    def step(carry, key):
        params, state = carry
        which, noise, routers = jax.random.split(key, 3)
        rows = jax.random.randint(which, (BATCH,), 0, len(images))
        seen = noisy(images[rows], noise)

        def loss(params):
            total = jnp.zeros(())
            for task in tasks:
                outputs, sown = model.apply(
                    {"params": params}, seen, task,
                    mutable=["moe"], rngs={"router": jax.random.fold_in(routers, task)},
                )  # fmt: skip
                total += loss_of(task, outputs, images[rows], labels[rows]) + total_loss(sown)
            return total

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(seed):
        of_params, of_batches = jax.random.split(jax.random.key(seed))
        params = model.init(of_params, images[:1], 0)["params"]
        keys = jax.random.split(of_batches, steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    return train


def scoring(model: Heads, tasks: tuple[int, ...], data: examples.Examples) -> Any:
    """Make the function from params to held-out accuracies, the error of edges, and what tasks share."""
    images, labels = jnp.asarray(data.inputs), jnp.asarray(data.labels)
    seen = noisy(images, jax.random.key(0))

    @jax.jit
    def score(params):
        found, loads = {}, {}
        for task in tasks:
            outputs, sown = model.apply({"params": params}, seen, task, mutable=["moe"])
            name = TASKS[task]
            if name == "edges":
                found[name] = jnp.sqrt(jnp.mean((outputs - edges(images)) ** 2))
            else:
                wanted = labels if name == "digit" else (labels > 4).astype(int)
                found[name] = jnp.mean(jnp.argmax(outputs, -1) == wanted)
            if sown:
                loads[name] = sown["moe"]["encoder"]["pairs"]["experts"]["statistics"]["routing"].load
        for a, b in itertools.combinations(loads, 2):  # the part of assignments that go to the same experts
            found[f"shared by {a}, {b}"] = jnp.minimum(loads[a], loads[b]).sum(-1).mean()
        return found

    return score


def sizes(model: Heads, shape: tuple[int, ...]) -> dict[str, int]:
    """Parameters, and those that a token meets in a task, without heads."""
    init = functools.partial(model.init, task=0)
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros(shape))["params"]["encoder"]
    every = jax.tree_util.tree_leaves_with_path(params)
    total = sum(leaf.size for _, leaf in every)
    idle = 0
    for path, leaf in every:
        where = jax.tree_util.keystr(path)
        if "['experts']['experts']" in where:
            idle += leaf.size * (EXPERTS["experts"] - EXPERTS["k"]) // EXPERTS["experts"]
        elif "['router']" in where and model.encoder.gate == "router":
            idle += leaf.size * (len(TASKS) - 1) // len(TASKS)
    return {"parameters": total, "active": total - idle}


def run(name: str, steps: int, seeds: int) -> dict[str, Any]:
    """Train and score one of `MODELS`: sizes, and a list over seeds of each score."""
    data = examples.digits()
    model = Heads(M3ViT(**SHAPE, mixer=LinearAttention(heads=4), **MODELS[name]))
    every = tuple(range(len(TASKS)))
    groups = [(task,) for task in every] if name == "an encoder for each task" else [every]
    found: dict[str, Any] = sizes(model, (1, *data.train.inputs.shape[1:]))
    found["parameters"] *= len(groups)
    for tasks in groups:
        train, score = training(model, tasks, data.train, steps), scoring(model, tasks, data.held_out)
        every_seed = [score(train(seed)) for seed in range(seeds)]
        found |= {name: [round(float(s[name]), 4) for s in every_seed] for name in every_seed[0]}
    return found


def mean_difference(mine: dict[str, Any], alone: dict[str, Any]) -> list[float]:
    """By seed the mean over tasks of how much better they are than with encoders of their own, relatively."""
    better = []
    for task in TASKS:
        a, b = np.asarray(mine[task]), np.asarray(alone[task])
        better.append((b - a) / b if task == "edges" else (a - b) / b)
    return np.mean(better, 0).round(4).tolist()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two steps of one model; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args(argv)
    if args.smoke:
        print(run("routers by task", 2, 1))
        return
    settings: dict[str, Any] = (
        SHAPE | EXPERTS | {"batch": BATCH, "noise": NOISE, "rate": RATE, "steps": 400, "seeds": 3}
    )
    stored = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows: dict[str, Any] = stored["rows"] if stored.get("settings") == settings else {}
    alone, *others = reversed(MODELS)  # what the others are compared with comes first
    for name in (alone, *sorted(others, reverse=True)):
        if name not in rows:
            rows[name] = run(name, settings["steps"], settings["seeds"])
            rows[name]["mean difference"] = mean_difference(rows[name], rows[alone])
        print(f"{name}: {rows[name]}", flush=True)
        result = about() | {"held_out": len(examples.digits().held_out.labels), "settings": settings}
        ordered = {name: rows[name] for name in MODELS if name in rows}
        args.out.write_text(json.dumps(result | {"rows": ordered}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
