"""A vision transformer's weights and activations in minifloats and in integers of as many bits, by method.

  python -m experiments.studies.minifloat_digits               some minutes on a core; writes the JSON
  python -m experiments.studies.minifloat_digits --smoke       seconds, and writes nothing

Two layers of a ViT are trained on scikit-learn's digits; then every matrix of its layers and every token that
one of them reads are rounded, a scale for each column of a matrix and for each token. Weights are rounded to
the nearest, by AWQ or by GPTQ, each alone and with one more method: scales searched for the least squared
error, weights equalised across what is linear, biases corrected, roundings learned.

Source: Aggarwal et al. 2023 (arXiv 2311.12359), at a scale that a CPU has.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from experiments.benchmarks.interleaved import about, write
from experiments.data import examples
from frugax import formats, quant

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "minifloat_digits.json"
DEPTH, WIDTH, HEADS, HIDDEN, PATCH = 2, 32, 4, 64, 2
BATCH, RATE, STEPS, SEEDS, LEARNED = 64, 3e-3, 1000, 3, 300
FORMATS = {
    **{f"int{n}": formats.format_named(f"int{n}") for n in (3, 4, 6)},
    **{
        f"fp{1 + e + m}_e{e}m{m}": formats.Format(f"fp{1 + e + m}_e{e}m{m}", formats.Minifloat.of(e, m))
        for e, m in ((2, 0), (2, 1), (3, 0), (2, 3), (3, 2))
    },
}
BASES = ("nearest", "awq", "gptq")
ADDITIONS = ("alone", "scales", "equalised", "bias", "learned")
# Matrices that share an input, and what gives it: the norm before them, or a matrix' outputs.
SHARED = {
    ("query", "key", "value"): "mixer_norm",
    ("out",): "value",  # attention sums over tokens, so that channels pass through it
    ("up",): "channel_norm",
    ("down",): "up",  # a ReLU lets positive factors through
}


class Layer(nn.Module):
    """Attention and an MLP of ReLUs, each behind a norm."""

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        y = nn.LayerNorm(name="mixer_norm")(x)
        q, k, v = (
            nn.Dense(WIDTH, name=name)(y).reshape(*y.shape[:2], HEADS, -1)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + nn.Dense(WIDTH, name="out")(mixed)
        y = nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="channel_norm")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.relu(y)), None


class ViT(nn.Module):
    """Images [B, 8, 8, 1] -> logits [B, 10]."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        B, H, W, _ = images.shape
        x = images.reshape(B, H // PATCH, PATCH, W // PATCH, PATCH).swapaxes(2, 3).reshape(B, -1, PATCH**2)
        place = self.param("place", nn.initializers.normal(0.02), (x.shape[1], WIDTH))
        x = nn.Dense(WIDTH, name="patches")(x) + place[None]
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH)
        x = nn.LayerNorm(name="norm")(layers(name="layers")(x, None)[0])
        return nn.Dense(10, name="head")(x.mean(1))


def train(data: examples.Examples, steps: int, seed: int) -> Any:
    """Params after `steps` of AdamW."""
    images, labels = jnp.asarray(data.inputs), jnp.asarray(data.labels)
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps), weight_decay=0.05
    )

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(images))

        def loss(params):
            logits = ViT().apply({"params": params}, images[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(key):
        params = ViT().init(key, images[:1])["params"]
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]

    return run(jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=2)
def logits_of(params: Any, images: Array, activations: formats.Format | None) -> Array:
    """Logits, with every token that a matrix of the layers reads rounded to a format."""

    def rounded(call, args, kwargs, context):
        module = context.module
        if activations is not None and isinstance(module, nn.Dense) and "layers" in module.path:
            args = (formats.fake_quantize(args[0], activations, axis=-1), *args[1:])
        return call(*args, **kwargs)

    with nn.intercept_methods(rounded):
        logits: Any = ViT().apply({"params": params}, images)
        return logits


Folded = tuple[dict[str, Any], dict[str, quant.Statistics]]


def folded(layers: dict[str, Any], statistics: dict[str, quant.Statistics], scale_of: Any) -> Folded:
    """Put scales between each matrix and what comes before it: the function stays as it was.

    Args:
      layers: params of the layers, stacked.
      statistics: of each matrix' inputs, by its name.
      scale_of: (names of matrices that share an input, what gives it, layers, statistics) -> scales or None.
    """
    layers, statistics = dict(layers), dict(statistics)
    for names, source in SHARED.items():
        s = scale_of(names, source, layers, statistics)
        if s is None:
            continue
        layers[source] = quant.divide_outputs(layers[source], s)
        for name in names:
            layers[name] = layers[name] | {"kernel": quant.multiply_inputs(layers[name]["kernel"], s)}
            statistics[name] = statistics[name].divided(s)
    return layers, statistics


def equalised(names, source, layers, statistics) -> Array | None:
    """The scales of equal ranges between two matrices."""
    if "kernel" not in layers[source]:
        return None
    return quant.equalization_scale(layers[source]["kernel"], layers[names[0]]["kernel"])


def quantized(
    params: Any, statistics: dict[str, quant.Statistics], format: formats.Format, base: str, addition: str
) -> Any:
    """Params whose layers' matrices have values of the format, by one of `BASES` with one of `ADDITIONS`."""
    layers = params["layers"]
    if addition == "equalised":
        layers, statistics = folded(layers, statistics, equalised)
    if addition == "scales":
        format = formats.Format(format.name, format.element, formats.LeastSquares())
    if base == "awq":

        def scale_of(names, source, layers, statistics):
            kernels = [layers[name]["kernel"] for name in names]
            return quant.awq_scale(kernels, statistics[names[0]], format)

        layers, statistics = folded(layers, statistics, scale_of)
    layers = dict(layers)
    for name, inputs in statistics.items():
        w, bias = layers[name]["kernel"], layers[name]["bias"]
        q = quant.gptq(w, inputs, format) if base == "gptq" else formats.quantize(w, format, axis=-2)
        if addition == "learned":
            q = quant.learned_rounding(w, inputs, format, start=q if base == "gptq" else None, steps=LEARNED)
        if addition == "bias":
            bias = bias + quant.bias_correction(w, q, inputs)
        layers[name] = {"kernel": q.dequantize(), "bias": bias}
    return params | {"layers": layers}


def calibrated(params: Any, images: Array) -> dict[str, quant.Statistics]:
    """Statistics of the inputs of each matrix of the layers, by its name."""
    found = quant.calibrate(ViT(), {"params": params}, [images], only="layers")
    return {path.split("/")[1]: s for path, s in found.items()}


def measure(params: Any, exact: Array, data: examples.Examples, format: formats.Format | None) -> list[float]:
    """Held-out accuracy, and the error of logits over their rms."""
    logits = logits_of(params, jnp.asarray(data.inputs), format)
    accuracy = np.mean(np.argmax(logits, -1) == data.labels)
    return [float(accuracy), float(jnp.sqrt(jnp.mean((logits - exact) ** 2) / jnp.mean(exact**2)))]


def run(names: list[str], steps: int, seeds: int) -> dict[str, Any]:
    """The whole table: {format: {base: {addition: [accuracy, error of logits]}}}, means over seeds."""
    data = examples.digits()
    models = [train(data.train, steps, seed) for seed in range(seeds)]
    exact = [logits_of(params, jnp.asarray(data.held_out.inputs), None) for params in models]
    inputs = [calibrated(params, jnp.asarray(data.train.inputs)) for params in models]

    def mean(scores: list[list[float]]) -> list[float]:
        return np.mean(scores, 0).round(5).tolist()

    whole = [measure(p, e, data.held_out, None) for p, e in zip(models, exact, strict=True)]
    rows: dict[str, Any] = {}
    for name in names:
        format = FORMATS[name]
        for base in BASES:
            for addition in ADDITIONS:
                few = [quantized(p, s, format, base, addition) for p, s in zip(models, inputs, strict=True)]
                scores = [measure(p, e, data.held_out, format) for p, e in zip(few, exact, strict=True)]
                rows.setdefault(name, {}).setdefault(base, {})[addition] = mean(scores)
            print(f"{name:9} {base:8} {rows[name][base]}", flush=True)
    return {"held_out": len(data.held_out.labels), "accuracy": mean(whole)[0], "rows": rows}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one format after two steps; writes nothing")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write, or to add rows to")
    args = parser.parse_args(argv)
    if args.smoke:
        run(["fp4_e2m1"], 2, 1)
        return
    settings = {"width": WIDTH, "depth": DEPTH, "steps": STEPS, "seeds": SEEDS, "learned_steps": LEARNED}
    before = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    result = about() | {"settings": settings} | run(args.formats, STEPS, SEEDS)
    rows = before | result["rows"]
    write(args.out, result | {"rows": {name: rows[name] for name in FORMATS if name in rows}})


if __name__ == "__main__":
    main()
