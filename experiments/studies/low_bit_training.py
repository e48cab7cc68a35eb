"""A small language model trained with each option of FP4 and FP8 training, beside one trained in float32.

  python -m experiments.studies.low_bit_training             half an hour on two cores; writes the JSON
  python -m experiments.studies.low_bit_training --smoke          two recipes for a few steps; writes nothing

The model reads bytes of the standard library: two layers of MLGRU and GLU, 64 wide, of which every dense
layer trains by a recipe of `frugax.quant.training`; embedding, head and norms don't. Runs of one seed share
initial params and batches, so that a gap to float32 is of one seed, and its spread is over seeds. What is
evaluated is the low-bit model, on bytes that were held out.

Source: Hu et al. 2025, Elucidating the Design Space of FP4 training (arXiv 2509.17791), at a CPU's scale.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

import frugax
from experiments.benchmarks.interleaved import about
from experiments.data import find_corpus
from frugax.quant.training import LowBit, Recipe, recipe_named

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "low_bit_training.json"
BATCH, LENGTH, STEPS, RATE, SEEDS = 8, 128, 400, 4e-3, 4
HELD_OUT = 256  # rows of LENGTH bytes

PLAIN = Recipe(stochastic=False)  # E2M1 in blocks of 32 under powers of two, rounded to the nearest
ALL = Recipe(tensor_scale=True, hadamard=True)  # and stochastic: what the paper combines
but = dataclasses.replace
RECIPES: dict[str, Recipe | None] = {
    "float32": None,
    "fp8_current": recipe_named("fp8_current"),
    "fp8_delayed": but(recipe_named("fp8_delayed"), history=16),
    "nvfp4": recipe_named("nvfp4"),
    "plain": PLAIN,
    "plain, forward alone": but(PLAIN, gradient=None),
    "plain + stochastic": but(PLAIN, stochastic=True),
    "plain + Hadamard": but(PLAIN, hadamard=True),
    "plain + tensor scale": but(PLAIN, tensor_scale=True),
    "plain + power gradient": but(PLAIN, rounding_gradient="power"),
    "plain + spline gradient": but(PLAIN, rounding_gradient="spline"),
    "plain + scale gradient": but(PLAIN, scale_gradient=True),
    "stochastic + Hadamard": but(PLAIN, stochastic=True, hadamard=True),
    "stochastic, ue5m3": but(PLAIN, stochastic=True, scale="ue5m3"),
    "all three, e8m0": ALL,
    "all three, e4m3": but(ALL, scale="e4m3"),
    "all three, e4m3, no tensor scale": but(ALL, scale="e4m3", tensor_scale=False),
    "all three, ue5m3": but(ALL, scale="ue5m3"),
    "all three, ue5m3, no tensor scale": but(ALL, scale="ue5m3", tensor_scale=False),
    "all three, float32": but(ALL, scale="float32", tensor_scale=False),
}


def text() -> tuple[np.ndarray, np.ndarray]:
    """The bytes to train on, and rows [HELD_OUT, LENGTH + 1] of those held out."""
    corpus = find_corpus(None)
    train, held_out = (
        np.frombuffer(b"".join(span.read() for span in spans), np.uint8)
        for spans in (corpus.train, corpus.heldout)
    )
    starts = np.linspace(0, len(held_out) - LENGTH - 1, HELD_OUT).astype(int)
    return train, np.stack([held_out[i : i + LENGTH + 1] for i in starts])


def batches(train: np.ndarray, seed: int, steps: int) -> np.ndarray:
    """Rows at random places, [steps, BATCH, LENGTH + 1]."""
    starts = np.random.default_rng(seed).integers(len(train) - LENGTH - 1, size=(steps, BATCH, 1))
    return train[starts + np.arange(LENGTH + 1)]


def build(recipe: Recipe | None) -> Any:
    """The language model, whose dense layers train by the recipe; None: in float32."""
    block = frugax.layers.Block("MLGRU", "GLU", (), {"expand": 2.0})
    model = frugax.layers.Decoder(256, 64, (block,), repeats=2, tie_embeddings=False)
    return model if recipe is None else LowBit(model, recipe)


def bits(module: Any, variables: Any, rows: Any, key: Any = None) -> Any:
    """Mean bits a byte of rows [B, T + 1]."""
    rngs = {} if key is None else {"low_bit": key}
    rows = rows.astype(jnp.int32)
    logits, _ = module.apply(variables, rows[:, :-1], rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean() / math.log(2)


def train(module: Any, steps: int) -> Any:
    """Make (seed, rows [steps, ...], held_out) -> held-out bits a byte after the steps."""
    schedule = optax.warmup_cosine_decay_schedule(0, RATE, max(steps // 10, 1), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))

    def step(carry, given):
        variables, state = carry
        rows, key = given
        loss, grads = jax.value_and_grad(functools.partial(bits, module))(variables, rows, key)
        updates, state = optimizer.update(grads["params"], state, variables["params"])
        new = {"params": optax.apply_updates(variables["params"], updates)}
        if OVERWRITE_WITH_GRADIENT in grads:  # histories of delayed scaling
            new[OVERWRITE_WITH_GRADIENT] = grads[OVERWRITE_WITH_GRADIENT]
        return (new, state), loss

    def run(seed, rows, held_out):
        variables = module.init(jax.random.key(seed), held_out[:1, :-1].astype(jnp.int32))
        carry = variables, optimizer.init(variables["params"])
        keys = jax.random.split(jax.random.key(100 + seed), steps)
        (variables, _), _ = jax.lax.scan(step, carry, (rows, keys))
        return bits(module, variables, held_out)

    return run


def run(recipe: Recipe | None, data: np.ndarray, held_out: np.ndarray, steps: int, seeds: int) -> list[float]:
    """Held-out bits a byte for each seed; a run that diverges has NaN."""
    every = jnp.arange(seeds)
    rows = np.stack([batches(data, seed, steps) for seed in range(seeds)])
    together = jax.jit(jax.vmap(train(build(recipe), steps), in_axes=(0, 0, None)))
    return [round(float(x), 4) for x in together(every, rows, held_out)]


def rows_of(reached: dict[str, list[float]]) -> dict[str, Any]:
    """For each recipe the bits of each seed, and the mean gap to float32 with its standard error."""
    rows = {}
    for name, values in reached.items():
        gap = np.subtract(values, reached["float32"])
        error = gap.std(ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else 0.0
        rows[name] = {
            "held_out_bits_per_byte": values,
            "gap": round(float(gap.mean()), 4),
            "standard_error": round(float(error), 4),
        }
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two recipes for a few steps; writes nothing")
    parser.add_argument(
        "--only", default="", help="recipes by name, separated by ';', added to the JSON there"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args(argv)
    steps, seeds = (8, 1) if args.smoke else (STEPS, SEEDS)
    names = ["float32", "fp8_delayed"] if args.smoke else args.only.split(";") if args.only else list(RECIPES)
    data, held_out = text()
    reached: dict[str, list[float]] = {}
    if args.only and args.out.exists():
        before = json.loads(args.out.read_text())["rows"]
        reached = {name: row["held_out_bits_per_byte"] for name, row in before.items()}
    for name in names:
        start = time.monotonic()
        reached[name] = run(RECIPES[name], data, held_out, steps, seeds)
        print(f"{name:30} {reached[name]} bits a byte, {time.monotonic() - start:.0f} s", flush=True)
        if not args.smoke and "float32" in reached:
            task = {
                "model": "2 layers of MLGRU and GLU, 64 wide",
                "steps": steps,
                "seeds": seeds,
            }
            size = {"batch": [BATCH, LENGTH], "learning_rate": RATE, "held_out_bytes": held_out[:, 1:].size}
            in_order = {n: reached[n] for n in RECIPES if n in reached}
            args.out.write_text(
                json.dumps(about() | task | size | {"rows": rows_of(in_order)}, indent=2) + "\n"
            )


if __name__ == "__main__":
    main()
