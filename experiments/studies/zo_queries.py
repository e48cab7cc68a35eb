"""Accuracy over forward passes of every method of the zeroth-order benchmark, on one small classifier.

  python -m experiments.studies.zo_queries                    a few minutes on a core; writes the JSON
  python -m experiments.studies.zo_queries --smoke            seconds, and writes nothing

The task: 32 clusters in 24 dimensions have one of four labels. A network of two hidden layers (2,000
parameters) learns half of them by gradients to begin with; all of them, moved by a shift, are what each
method then learns. A query is a forward pass over a batch of 64; a forward gradient counts as two, a gradient
as three. Each method runs at five learning rates, a factor 3 apart, and three seeds; the rate is the one with
the best mean accuracy at the end. Steps of Sparse MeZO and of random masks move a quarter of the weights;
blocks are the layers; hybrid training takes the gradient of the last layer.

Source: Zhang et al. 2024 (arXiv 2402.11592), with the methods, at a scale that a CPU has.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.benchmarks.interleaved import about
from frugax.optim import mezo_step
from frugax.optim import zeroth_order as zo

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "zo_queries.json"
INPUTS, WIDTH, CLUSTERS, LABELS, BATCH = 24, 32, 32, 4, 64
RATES = (1 / 9, 1 / 3, 1, 3, 9)  # of a method's middle one
LAYERS = ("first", "second", "last")
EPSILON = 1e-3
AWAY = zo.two_point(EPSILON, in_place=False)

Step = Callable[..., tuple[Any, Any]]  # (loss, params, state, key, rate) -> (params, state)


class Method(NamedTuple):
    """A way to train: queries of a step, the middle one of its rates, params -> state, and a step."""

    queries: int
    rate: float
    init: Callable[[Any], Any]
    step: Step


def stateless(queries: int, rate: float, step: Callable[..., Any]) -> Method:
    """A method without state: step(loss, params, key, rate) -> (params, record)."""
    return Method(queries, rate, lambda params: (), lambda loss, p, s, key, r: (step(loss, p, key, r)[0], s))


def by_optax(queries: int, rate: float, rule: optax.GradientTransformation, gradient: Any) -> Method:
    """An Optax rule on gradient(loss, params, key)."""

    def step(loss, params, state, key, rate):
        updates, state = rule.update(gradient(loss, params, key), state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state

    return Method(queries, rate, rule.init, step)


def estimated(loss: Any, params: Any, key: Array) -> Any:
    """One two-point estimate of the gradient."""
    return zo.zo_gradient(loss, params, key, estimator=AWAY)[0]


def hybrid(rate: float) -> Method:
    """The last layer by its gradient, the others by MeZO."""
    is_last = lambda path: path.startswith("last")  # noqa: E731

    def step(loss, params, state, key, rate):
        params, _, _ = zo.hybrid_step(
            loss, params, key, optax.sgd(30 * rate), (optax.EmptyState(), optax.EmptyState()),
            first_order=is_last, learning_rate=rate, estimator=AWAY,
        )  # fmt: skip
        return params, state

    return Method(4, rate, lambda params: (), step)


def masked(loss: Any, params: Any, key: Array, rate: Array, direction: Any) -> Any:
    """MeZO along a direction that moves some weights."""
    return zo.zo_step(loss, params, key, learning_rate=rate, estimator=AWAY, direction=direction)


def small_weights(loss: Any, params: Any, key: Array, rate: Array) -> Any:
    """Sparse MeZO, with thresholds of the params at each step."""
    return masked(loss, params, key, rate, zo.sparse(zo.magnitude_thresholds(params, 0.25)))


def in_blocks(loss: Any, params: Any, key: Array, rate: Array) -> Any:
    """A layer after the other."""
    blocks = [lambda path, name=name: path.startswith(name) for name in LAYERS]
    return zo.blockwise_step(loss, params, key, blocks=blocks, learning_rate=rate, epsilon=EPSILON)


METHODS = {
    "MeZO (ZO-SGD)": stateless(
        2, 3e-3, lambda f, p, key, r: mezo_step(f, p, key, learning_rate=r, epsilon=EPSILON)
    ),
    "ZO-SGD-sign": by_optax(2, 3e-3, optax.stateless(lambda g, p: jax.tree.map(jnp.sign, g)), estimated),
    "ZO-SGD-momentum": by_optax(2, 3e-4, optax.trace(0.9), estimated),
    "ZO-SGD-conservative": stateless(
        5, 1e-2, lambda f, p, key, r: zo.conservative_step(f, p, key, learning_rate=r, estimator=AWAY)
    ),
    "ZO-Adam": by_optax(2, 3e-3, optax.scale_by_adam(), estimated),
    "forward gradient": stateless(
        2, 3e-3, lambda f, p, key, r: zo.zo_step(f, p, key, learning_rate=r, estimator=zo.forward_gradient())
    ),
    "Sparse MeZO": stateless(2, 1e-2, small_weights),
    "random masks": stateless(2, 1e-2, lambda f, p, key, r: masked(f, p, key, r, zo.random_subset(0.25))),
    "block-wise": stateless(6, 1e-2, in_blocks),
    "hybrid": hybrid(3e-3),
    "SGD, first order": by_optax(3, 1e-1, optax.identity(), lambda f, p, key: jax.grad(f)(p)),
}


def scores(params: Any, x: Array) -> Array:
    """The classifier."""
    for name in LAYERS:
        x = x @ params[name]["kernel"] + params[name]["bias"][None]
        x = jax.nn.gelu(x) if name != "last" else x
    return x


def task(key: Array) -> tuple[Callable[[Array, int, bool], tuple[Array, Array]], Any]:
    """Make (key, count, moved) -> inputs and labels, of half of the clusters unless moved; and params."""
    of_centres, of_shift, *of_params = jax.random.split(key, 5)
    centres = 0.5 * jax.random.normal(of_centres, (CLUSTERS, INPUTS))
    shift = 0.5 * jax.random.normal(of_shift, (INPUTS,))

    def draw(key: Array, count: int, moved: bool) -> tuple[Array, Array]:
        which, noise = jax.random.split(key)
        cluster = jax.random.randint(which, (count,), 0, CLUSTERS if moved else CLUSTERS // 2)
        x = centres[cluster] + moved * shift[None] + 0.5 * jax.random.normal(noise, (count, INPUTS))
        return x, cluster % LABELS

    sizes = (INPUTS, WIDTH, WIDTH, LABELS)
    params = {
        name: {"kernel": jax.random.normal(k, (m, n)) * m**-0.5, "bias": jnp.zeros(n)}
        for name, k, m, n in zip(LAYERS, of_params, sizes[:-1], sizes[1:], strict=True)
    }
    return draw, params


def loss_of(params: Any, batch: tuple[Array, Array]) -> Array:
    """The mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(scores(params, batch[0]), batch[1]).mean()


def pretrained(draw: Any, params: Any, steps: int) -> Any:
    """The params after SGD on the clusters of the start."""

    def step(p, key):
        gradient = jax.grad(loss_of)(p, draw(key, BATCH, False))
        return jax.tree.map(lambda p, g: p - 0.1 * g, p, gradient), None

    return jax.lax.scan(step, params, jax.random.split(jax.random.key(1), steps))[0]


def accuracies(method: Method, draw: Any, params: Any, budgets: list[int], rate: Array, seed: Array) -> Array:
    """Held-out accuracy after each budget of queries, multiples of the first."""
    held_out = draw(jax.random.key(2), 2000, True)

    def step(carry, key):
        params, state = carry
        batch = draw(jax.random.fold_in(key, 1), BATCH, True)
        return method.step(lambda p: loss_of(p, batch), params, state, key, rate), None

    def segment(carry, key):
        carry, _ = jax.lax.scan(step, carry, jax.random.split(key, budgets[0] // method.queries))
        return carry, jnp.mean(jnp.argmax(scores(carry[0], held_out[0]), axis=-1) == held_out[1])

    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), seed), len(budgets))
    return jax.lax.scan(segment, (params, method.init(params)), keys)[1]


def run(method: Method, draw: Any, params: Any, budgets: list[int], seeds: int) -> dict[str, Any]:
    """The mean accuracies at the best of the rates, and that rate."""
    rates = method.rate * jnp.asarray(RATES)
    every = jnp.arange(seeds)
    one = lambda rate, seed: accuracies(method, draw, params, budgets, rate, seed)  # noqa: E731
    found = np.asarray(jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(rates, every)).mean(1)
    best = int(np.argmax(found[:, -1]))
    return {
        "rate": round(float(rates[best]), 7),
        "place_of_rate": best,  # among the five
        "queries_of_a_step": method.queries,
        "accuracy": [round(float(x), 4) for x in found[best]],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps of each method; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args(argv)
    budgets = [60, 120] if args.smoke else [600 * i for i in range(1, 11)]
    draw, params = task(jax.random.key(0))
    params = jax.jit(lambda p: pretrained(draw, p, 10 if args.smoke else 400))(params)
    held_out = draw(jax.random.key(2), 2000, True)
    before = float(jnp.mean(jnp.argmax(scores(params, held_out[0]), axis=-1) == held_out[1]))
    rows = {}
    for name, method in METHODS.items():
        rows[name] = run(method, draw, params, budgets, 1 if args.smoke else 3)
        print(f"{name:22} {rows[name]}", flush=True)
    if not args.smoke:
        result = {
            "task": f"{CLUSTERS} clusters in {INPUTS} dimensions, {LABELS} labels, moved by a shift",
            "parameters": int(optax.tree.size(params)),
            "batch": BATCH,
            "seeds": 3,
            "accuracy_before": round(before, 4),
            "queries": budgets,
        }
        args.out.write_text(json.dumps(about() | result | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
