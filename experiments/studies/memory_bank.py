"""Do memories by document hold rare facts that a dense model of the same resident size has no room for?

  python -m experiments.studies.memory_bank                    about five minutes on a core; writes the JSON
  python -m experiments.studies.memory_bank --smoke            seconds, and writes nothing

The world: 2,048 subjects with names of two tokens, the k-th most popular in 1 / k of the documents of the
first. A document names a subject; the model says a common fact (one of 32, by the first token, which many
documents teach) and, after the second token, the subject's own fact (one of 32, at random). Subjects belong
to topics of topics, which a document's embedding shows, with noise.

The models: an anchor that fetches memories down a tree of 8 x 8 clusters of embeddings, a dense model with as
many more hidden units as the anchor fetches, the anchor alone, and one that keeps all units of the bank
resident. Facts are counted by quarters of subjects, from popular to rare; memories of another document show
what the memories hold, beside the anchor.

Source: Pouransari et al. 2025 (arXiv 2510.02375), at a scale that a CPU has.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.benchmarks.interleaved import about
from frugax import moe
from frugax.layers import Block, Decoder

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "memory_bank.json"
SUBJECTS, SYMBOLS, ANSWERS, EMBEDDING = 2048, 64, 32, 16
BRANCHING, HIDDEN = (8, 8), (8, 8)  # of the tree; hidden units of a node in each layer
WIDTH, DEPTH, ANCHOR, BATCH = 32, 2, 16, 64  # ANCHOR: hidden units of the anchor's layers
UNITS = {  # hidden units of a layer that are always resident
    "anchor with memories": ANCHOR,
    "dense, same resident size": ANCHOR + sum(HIDDEN),
    "anchor alone": ANCHOR,
    "dense, all of the bank resident": ANCHOR + 8 * HIDDEN[0] + 64 * HIDDEN[1],
}
RATE = 3e-3


class World(NamedTuple):
    """Names [n, 2], facts [n, 2] (common, own), logs of popularity [n] and topics [n, D] of subjects."""

    names: Array
    facts: Array
    popularity: Array
    topics: Array


def world(seed: int, subjects: int = SUBJECTS) -> World:
    """Make subjects up; the first is the most popular."""
    rng = np.random.default_rng(seed)
    names = rng.choice(SYMBOLS**2, subjects, replace=False)
    names = np.stack([names // SYMBOLS, names % SYMBOLS], -1)
    common = rng.integers(0, ANSWERS, SYMBOLS)[names[:, 0]]
    facts = np.stack([common, rng.integers(0, ANSWERS, subjects)], -1)
    areas = 4 * rng.standard_normal((BRANCHING[0], EMBEDDING))
    topics = areas[:, None] + 2 * rng.standard_normal((*BRANCHING, EMBEDDING))
    mine = topics.reshape(-1, EMBEDDING)[rng.integers(0, BRANCHING[0] * BRANCHING[1], subjects)]
    mine = mine + 0.5 * rng.standard_normal(mine.shape)
    popularity = -np.log(np.arange(1, subjects + 1))
    return World(
        jnp.asarray(names), jnp.asarray(facts), jnp.asarray(popularity), jnp.asarray(mine, jnp.float32)
    )


def embeddings(of: World, subjects: Array, key: Array) -> Array:
    """Embeddings of documents about the subjects: their topics, with noise."""
    topics = of.topics[subjects]
    return topics + 0.2 * jax.random.normal(key, topics.shape)


def decoder(units: int) -> Decoder:
    """Make a decoder with so many hidden units in each layer."""
    block = Block("MLGRU", "MemoryGLU", channel_args={"expand": units / WIDTH})
    return Decoder(vocab_size=SYMBOLS, width=WIDTH, blocks=(block,), repeats=DEPTH, tie_embeddings=False)


def train(of: World, model: Decoder, steps: int, seed: int, tree: moe.ClusterTree | None) -> tuple[Any, Any]:
    """Train a model, with memories where there is a tree; returns params and the bank."""
    of_params, of_bank, of_batches = jax.random.split(jax.random.key(seed), 3)
    variables = model.init(of_params, of.names[:1])
    bank: moe.memory.Bank = ()
    if tree is not None:
        bank = moe.memory_bank(of_bank, variables["memory"], tree.nodes, HIDDEN)
    adam, params = optax.adam(1.0), variables["params"]
    rate = optax.cosine_decay_schedule(RATE, steps)

    def step(carry, key):
        params, state, bank, memories, count = carry
        which, noise = jax.random.split(key)
        subjects = jax.random.categorical(which, of.popularity, shape=(BATCH,))
        nodes, local = (), None
        if tree is not None:
            path = moe.route_document(embeddings(of, subjects, noise), tree)
            nodes, local = moe.distinct_nodes(path, tree.nodes)

        def loss(params, part):
            given = (
                {"params": params} if tree is None else {"params": params, "memory": moe.fetch(part, local)}
            )
            logits, _ = model.apply(given, of.names[subjects])
            return optax.softmax_cross_entropy_with_integer_labels(logits, of.facts[subjects]).mean()

        grads, of_part = jax.grad(loss, (0, 1))(params, moe.take_nodes(bank, nodes))
        now = optax.chain(adam, optax.scale(rate(count)))
        updates, state = now.update(grads, state)
        bank, memories = moe.update_nodes(now, of_part, memories, bank, nodes)
        return (optax.apply_updates(params, updates), state, bank, memories, count + 1), None

    like = optax.chain(adam, optax.scale(1.0))
    start = params, like.init(params), bank, moe.init_nodes(like, bank), 0
    params, _, bank, _, _ = jax.jit(functools.partial(jax.lax.scan, step))(
        start, jax.random.split(of_batches, steps)
    )[0]
    return params, bank


def right(of: World, model: Decoder, params: Any, bank: Any, path: Array | None) -> np.ndarray:
    """Say if each subject's common and own fact are right, [n, 2]."""

    @jax.jit
    def answers(names, path):
        memory = {} if path is None else {"memory": moe.fetch(bank, path)}
        return jnp.argmax(model.apply({"params": params} | memory, names)[0], -1)

    n = len(of.names)
    parts = [slice(i, i + 256) for i in range(0, n, 256)]
    found = [answers(of.names[part], None if path is None else path[part]) for part in parts]
    return np.asarray(jnp.concatenate(found) == of.facts)


def run(steps: int, seed: int, subjects: int = SUBJECTS, models: int = len(UNITS)) -> dict[str, Any]:
    """Accuracies and sizes in one world of the first so many models of `UNITS`."""
    of = world(seed, subjects)
    sample, known, seen = jax.random.split(jax.random.key(1000 + seed), 3)
    documents = jax.random.categorical(sample, of.popularity, shape=(4 * subjects,))
    tree = moe.cluster_tree(np.asarray(embeddings(of, documents, known)), BRANCHING, seed=seed)
    path = moe.route_document(embeddings(of, jnp.arange(subjects), seen), tree)
    rows = {}
    for name, units in list(UNITS.items())[:models]:
        model, has_memories = decoder(units), name == "anchor with memories"
        params, bank = train(of, model, steps, seed, tree if has_memories else None)
        found = right(of, model, params, bank, path if has_memories else None)
        held = sum(x.size for x in jax.tree.leaves(params))
        sizes = {"resident": held, "stored": held + sum(x.size for x in jax.tree.leaves(bank))}
        if has_memories:
            one = jax.eval_shape(lambda bank=bank: moe.fetch(bank, path[:1]))
            sizes["resident"] += sum(x.size for x in jax.tree.leaves(one))
        rows[name] = sizes | accuracies(found)
        if has_memories:
            other = (path + jnp.asarray(tree.nodes) // 2) % jnp.asarray(tree.nodes)
            rows["with another document's memories"] = sizes | accuracies(
                right(of, model, params, bank, other)
            )
    return rows


def accuracies(found: np.ndarray) -> dict[str, float]:
    """Shares of right answers: of common facts, and of own facts by quarters, popular ones first."""
    quarters = {f"quarter {i + 1}": part.mean() for i, part in enumerate(np.array_split(found[:, 1], 4))}
    return {"common": found[:, 0].mean()} | quarters


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps of two models; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args(argv)
    steps, seeds, subjects, models = (4, 1, 96, 2) if args.smoke else (2000, 3, SUBJECTS, len(UNITS))
    every = [run(steps, seed, subjects, models) for seed in range(seeds)]
    rows = {}
    for name, first in every[0].items():
        values = {key: [float(result[name][key]) for result in every] for key in first}
        rows[name] = {
            key: int(v[0]) if key in ("resident", "stored") else [round(x, 4) for x in v]
            for key, v in values.items()
        }
        means = ", ".join(f"{key} {np.mean(v):.3f}" for key, v in values.items())
        print(f"{name}: {means}", flush=True)
    if not args.smoke:
        result = {
            "subjects": subjects, "answers": ANSWERS, "branching": BRANCHING, "hidden": HIDDEN,
            "width": WIDTH, "layers": DEPTH, "batch": BATCH, "steps": steps, "seeds": seeds,
        }  # fmt: skip
        args.out.write_text(json.dumps(about() | result | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
