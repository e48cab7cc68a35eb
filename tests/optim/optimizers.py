"""Every optimizer of the family, small, with what the conformance suite needs to know of each."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax import optim

RANK = 2


class Case(NamedTuple):
    make: object  # learning rate -> optimizer
    rate: float  # that converges on the quadratic
    bytes_of: object  # (shape of a leaf, whether it is a matrix) -> bytes of its state
    shared: int = 4  # bytes that the leaves share
    stacks: bool = True  # a stacked leaf is a loop over its slices


def adam_bytes(shape):
    return 4 * (2 * math.prod(shape) + 1)


def per_matrix(count):
    """Bytes of a leaf: `count(m, n)` numbers for each of its matrices and one for the leaf; Adam's for
    others."""

    def bytes_of(shape, is_matrix):
        if not is_matrix:
            return adam_bytes(shape)
        *batch, m, n = shape
        return 4 * (math.prod(batch) * count(min(m, n), max(m, n)) + 1)

    return bytes_of


def in_slots(shape, is_layer):
    """Bytes of a leaf of which one layer is active."""
    return adam_bytes(shape[1:]) if is_layer else adam_bytes(shape)


def quantized(shape, is_matrix):
    """Bytes of q_galore's: int4 in pairs along m, a byte a moment, 4 a scale of a row or column, schedule."""
    if not is_matrix:
        return 2 * (math.prod(shape) + 4 * math.prod(shape[:-1])) + 4
    *batch, m, n = shape
    m, n = min(m, n), max(m, n)
    return math.prod(batch) * (R * math.ceil(m / 2) + 4 * R + 2 * R * (n + 4) + 16) + 4


R = RANK
IN_LAYERS = optim.MatrixSpec(rules={"(^|/)layers/": optim.MatrixAxes()}, names="none")
CASES = {
    "apollo": Case(
        lambda rate: optim.apollo(rate, rank=R, update_interval=7),
        0.1,
        per_matrix(lambda m, n: 2 * R * n + 1),
    ),
    "apollo_mini": Case(
        lambda rate: optim.apollo_mini(rate, update_interval=7, scale=1.0),
        0.1,
        per_matrix(lambda m, n: 2 * n + 1),
    ),
    "badam": Case(
        lambda rate: optim.badam(rate, update_interval=7, rest=optax.scale_by_adam()),
        0.1,
        lambda shape, is_layer: in_slots(shape, is_layer) + 8 * is_layer,
        shared=8,
        stacks=False,
    ),
    "cosmos": Case(
        lambda rate: optim.cosmos(rate, rank=R),
        0.1,
        lambda shape, matrix: (
            per_matrix(lambda m, n: m * n + m * R + R * R + R * n)(shape, matrix) - 4 * matrix
        ),
    ),
    "dct_adamw": Case(
        lambda rate: optim.dct_adamw(rate, rank=R),
        0.1,
        per_matrix(lambda m, n: R + 2 * R * n),
    ),
    "dct_adamw_feedback": Case(
        lambda rate: optim.dct_adamw(rate, rank=R, error_feedback="int8"),
        0.1,
        per_matrix(lambda m, n: R + 2 * R * n + m * n // 4 + m),
    ),
    "fira": Case(
        lambda rate: optim.fira(rate, rank=R, update_interval=7, scale=1.0),
        0.1,
        per_matrix(lambda m, n: m * R + 2 * R * n + 1),
    ),
    "frugal": Case(
        lambda rate: optim.frugal(rate, density=0.5, update_interval=7),
        0.1,
        per_matrix(lambda m, n: 2 * round(m / 2) * n),
    ),
    "frugal_blocks": Case(
        lambda rate: optim.frugal(rate, rank=1, update_interval=7, projector="blocks", spec=IN_LAYERS),
        0.1,
        in_slots,
        stacks=False,
    ),
    "frugal_coordinates": Case(
        lambda rate: optim.frugal(rate, rank=R, update_interval=7, projector="coordinates"),
        0.1,
        per_matrix(lambda m, n: 2 * R * n),
    ),
    "galore": Case(
        lambda rate: optim.galore(rate, rank=R, update_interval=7, scale=1.0),
        0.1,
        per_matrix(lambda m, n: m * R + 2 * R * n),
    ),
    "lion": Case(
        lambda rate: optim.lion(rate, weight_decay=0.0), 0.1, lambda shape, _: 4 * math.prod(shape), shared=0
    ),
    "lisa": Case(
        lambda rate: optim.lisa(rate, active=1, update_interval=7), 0.1, in_slots, shared=8, stacks=False
    ),
    "natural_galore": Case(
        lambda rate: optim.natural_galore(
            rate, rank=R, update_interval=7, history=3, scale=1.0, damping=100.0
        ),
        0.1,
        lambda shape, matrix: per_matrix(lambda m, n: m * R + 5 * R * n)(shape, matrix) + 4 * matrix,
    ),
    "q_galore": Case(
        lambda rate: optim.q_galore(rate, rank=R, update_interval=3, scale=1.0, queue=2, min_size=1),
        0.1,
        quantized,
    ),
    "trion": Case(
        lambda rate: optim.trion(rate, rank=R),
        0.1,
        lambda shape, matrix: 4 * math.prod(shape) if matrix else adam_bytes(shape),
    ),
}


def is_matrix(path):
    return path.endswith("kernel")


VOCABULARY, WIDTH, HIDDEN = 40, 24, 16


def params(dtype=jnp.float32):
    """A wide matrix, a stack of tall ones, a table and a vector: those of `logits`."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "bias": (VOCABULARY,),
        "embedding": (VOCABULARY, WIDTH),
        "layers": {"kernel": (2, WIDTH, HIDDEN)},
        "out": {"kernel": (WIDTH, VOCABULARY)},
    }
    flat, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    leaves = [jax.random.normal(k, s, dtype) / s[-1] ** 0.5 for k, s in zip(keys, flat, strict=True)]
    return tree.unflatten(leaves)


def logits(tree, tokens):
    """A language model of the last token alone: an embedding, two layers, and a head."""
    x = tree["embedding"][tokens]
    for w in tree["layers"]["kernel"]:
        x = x + jnp.tanh(x @ w) @ w.T
    return x @ tree["out"]["kernel"] + tree["bias"][None]


def language(length=2048):
    """A text of a random Markov chain, and the entropies of its tokens in nats: alone, and after the last."""
    rng = np.random.default_rng(0)
    p = np.exp(2 * rng.normal(size=(VOCABULARY, VOCABULARY)))
    p /= p.sum(axis=1, keepdims=True)
    text = [0]
    for _ in range(length):
        text.append(rng.choice(VOCABULARY, p=p[text[-1]]))
    pairs = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(pairs, (text[:-1], text[1:]), 1 / length)

    def entropy(p):
        return -np.sum(p * np.log(np.where(p > 0, p, 1)))

    return np.asarray(text), entropy(pairs.sum(axis=0)), entropy(pairs) - entropy(pairs.sum(axis=1))


def gradients(shape, steps, seed=0):
    """A sequence of gradients [steps, *shape] with a drifting mean, as float64 numpy."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=shape) + np.cumsum(0.2 * rng.normal(size=(steps, *shape)), axis=0)
    return mean + 0.3 * rng.normal(size=(steps, *shape))
