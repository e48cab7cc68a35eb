"""Three ways to estimate the memory of training, beside what the compiler asks for: errors in a table.

  python -m experiments.studies.memory_estimators             two minutes on a core; writes the JSON
  python -m experiments.studies.memory_estimators --smoke     seconds, and writes nothing

Each config is a step of Adam on a random MLP, convolutional network or Transformer. Its bytes are those of
`compiled.memory_analysis()` on CPU: arguments, results that take no argument's place, and temporaries. The
estimators are `frugax.planner.training_bytes` (formulas over layers), `frugax.planner.liveness` (the jaxpr),
and a small network over a config's sizes, fitted to two thirds of the configs. Errors are of the last third,
which nothing was fitted to. "Other families" is that network fitted without any config of the family.

Source: GPU Memory and Utilization Estimation for Training-Aware Resource Management, 2026 (arXiv 2602.17817).
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

from experiments.benchmarks.interleaved import about
from frugax.planner import Layer, convolution, dense, liveness, training_bytes, transformer_block

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "memory_estimators.json"
OPTIMIZER = optax.adam(1e-3)


class Config(NamedTuple):
    """A model to train: shapes of its params and of a batch, its loss, and its layers by formula."""

    params: Any
    batch: jax.ShapeDtypeStruct
    loss: Callable[[Any, jax.Array], jax.Array]
    layers: list[Layer]


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of an array of float32."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mlp(rng: np.random.Generator) -> Config:
    """Dense layers of one width."""
    depth, width, batch = int(rng.integers(2, 9)), 32 * int(rng.integers(1, 9)), 2 ** int(rng.integers(5, 12))

    def loss(params, x):
        for w, b in params:
            x = jax.nn.relu(x @ w + b)
        return jnp.mean(x**2)

    layers = [dense(width, width)] * depth
    return Config([(f32(width, width), f32(width))] * depth, f32(batch, width), loss, layers)


def cnn(rng: np.random.Generator) -> Config:
    """Convolutions that double their channels where they halve the sides, and one dense layer."""
    stages, first = int(rng.integers(1, 4)), 4 * int(rng.integers(1, 7))
    size, batch = 8 * int(rng.integers(1, 5)), 2 ** int(rng.integers(3, 7))
    params, layers, channels, side = [], [], 3, size
    for stage in range(stages):
        out = first * 2**stage
        for inputs in (channels, out):
            params.append((f32(3, 3, inputs, out), f32(out)))
            layers.append(convolution(side, inputs, out))
        channels, side = out, side // 2
    head = (f32(channels, 10), f32(10))
    layers.append(dense(channels, 10))

    def loss(params, x):
        kernels, (w, b) = params
        for i, (kernel, bias) in enumerate(kernels):
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
            x = jax.nn.relu(x + bias)
            if i % 2:  # the mean of 2 x 2 places
                n, h, _, c = x.shape
                x = x.reshape(n, h // 2, 2, h // 2, 2, c).mean((2, 4))
        return jnp.mean((x.mean((1, 2)) @ w + b) ** 2)

    return Config((params, head), f32(batch, size, size, 3), loss, layers)


def transformer(rng: np.random.Generator) -> Config:
    """Blocks of causal attention and an MLP, in a scan as often as one after another."""
    depth, heads = int(rng.integers(1, 7)), int(rng.choice([1, 2, 4]))
    width, time = 16 * heads * int(rng.integers(1, 3)), 32 * int(rng.integers(1, 5))
    batch, scanned = 2 ** int(rng.integers(0, 5)), bool(rng.integers(2))
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width)}
    shapes["down"] = (4 * width, width)

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def block(x, p):
        q, k, v = (a.reshape(batch, time, heads, -1) for a in jnp.split(norm(x) @ p["qkv"], 3, -1))
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        scores = jnp.where(jnp.tri(time, dtype=bool), scores, -1e30)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        x = x + mixed.reshape(x.shape) @ p["out"]
        return x + jax.nn.relu(norm(x) @ p["up"]) @ p["down"]

    def loss(params, x):
        if scanned:
            x = jax.lax.scan(lambda x, p: (block(x, p), None), x, params)[0]
        else:
            for p in params:
                x = block(x, p)
        return jnp.mean(x**2)

    one = {name: f32(*shape) for name, shape in shapes.items()}
    params = jax.tree.map(lambda a: f32(depth, *a.shape), one) if scanned else [one] * depth
    layers = [transformer_block(width, time=time, heads=heads)] * depth
    return Config(params, f32(batch, time, width), loss, layers)


FAMILIES = {"MLP": mlp, "CNN": cnn, "Transformer": transformer}


def step_of(config: Config) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A training step and the shapes of its arguments: params, the optimizer's state and a batch."""

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(config.loss)(params, batch)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step, (config.params, jax.eval_shape(OPTIMIZER.init, config.params), config.batch)


def asked_for(config: Config) -> int:
    """Bytes that the compiler asks for, with params and state donated."""
    step, args = step_of(config)
    found = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + new + found.temp_size_in_bytes


def by_formula(config: Config) -> int:
    """The analytic estimate."""
    return training_bytes(config.layers, batch=config.batch.shape[0]).total


def by_liveness(config: Config) -> int:
    """The estimate from the jaxpr."""
    step, args = step_of(config)
    return liveness(step, *args, donate_argnums=(0, 1)).peak


def features(config: Config) -> list[float]:
    """Sizes of a config, as logarithms: params, kept activations, batch, layers."""
    counted = training_bytes(config.layers, batch=config.batch.shape[0])
    return list(np.log([counted.params, counted.activations, config.batch.shape[0], len(config.layers)]))


def learned(x: np.ndarray, y: np.ndarray, steps: int = 3000) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a network of two hidden layers of 32 units to the logarithm of bytes; return it as a function."""
    mean, deviation, centre = x.mean(0), x.std(0) + 1e-6, y.mean()
    sizes = (x.shape[1], 32, 32, 1)
    keys = jax.random.split(jax.random.key(0), 3)
    params = [
        (jax.random.normal(k, (m, n)) * m**-0.5, jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]

    def predict(params, x):
        h = (x - mean[None]) / deviation[None]
        for i, (w, b) in enumerate(params):
            h = h @ w + b[None]
            h = jax.nn.gelu(h) if i < 2 else h
        return h[:, 0] + centre

    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, steps), weight_decay=1e-3)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.mean((predict(p, x) - y) ** 2))(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    fit = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, steps)[0][0])
    params = fit(params)
    return lambda x: np.asarray(jnp.exp(predict(params, jnp.asarray(x))))


def errors(estimate: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Relative errors: the median and the largest by size, and the median with its sign."""
    e = estimate / real - 1
    found = {"median": np.median(np.abs(e)), "largest": np.abs(e).max(), "signed": np.median(e)}
    return {name: round(float(value), 3) for name, value in found.items()}


def study(each: int, steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """Errors of each estimator on the held-out third of each family's configs."""
    rng = np.random.default_rng(0)
    configs = {name: [make(rng) for _ in range(each)] for name, make in FAMILIES.items()}
    real = {name: np.array([asked_for(c) for c in cs], np.float32) for name, cs in configs.items()}
    sizes = {name: np.array([features(c) for c in cs], np.float32) for name, cs in configs.items()}
    cut = 2 * each // 3

    def fitted(names: list[str]) -> Callable[[np.ndarray], np.ndarray]:
        x = np.concatenate([sizes[n][:cut] for n in names])
        return learned(x, np.log(np.concatenate([real[n][:cut] for n in names])), steps)

    on_all = fitted(list(FAMILIES))
    found = {}
    for name, cs in configs.items():
        held_out = cs[cut:]
        on_others = fitted([n for n in FAMILIES if n != name])
        estimates = {
            "formulas": np.array([by_formula(c) for c in held_out]),
            "liveness": np.array([by_liveness(c) for c in held_out]),
            "learned": on_all(sizes[name][cut:]),
            "learned, other families": on_others(sizes[name][cut:]),
        }
        found[name] = {kind: errors(e, real[name][cut:]) for kind, e in estimates.items()}
        print(name, found[name], flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a few configs of each family; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args(argv)
    each, steps = (3, 100) if args.smoke else (36, 3000)
    rows = study(each, steps)
    if not args.smoke:
        result = {"configs_of_a_family": each, "held_out": each - 2 * each // 3, "rows": rows}
        args.out.write_text(json.dumps(about() | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
