"""A trained language model cut into experts by the domains of its data, and tuned in turn with a router.

  python -m experiments.studies.read_me               a quarter of an hour on two cores; writes the JSON
  python -m experiments.studies.read_me --smoke       a few steps of it; writes nothing

The dense model reads bytes of four domains that every Python brings along. Its feed-forward layers are then
cut: each domain has an expert of the half of the neurons that its tokens activate most, and a router ahead of
the model gives each token one expert for all layers. Router and model are tuned in rounds, as the authors'
code does: the router by the labels of `frugax.moe.router_distillation`, with all neurons at work; then the
model by its own loss, each token with its expert's neurons alone. "random neurons" has the same sizes and
overlaps, with neurons drawn by lot; "dense" is tuned as long. What is reported runs on `frugax.layers.MoE`.

Source: Cai et al. 2024, Read-ME (arXiv 2410.19123), and its code.
"""

import argparse
import json
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import frugax
from experiments.benchmarks.interleaved import about
from experiments.studies.moe_routers import bits

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "read_me.json"
WIDTH, HIDDEN, LAYERS, LENGTH, BATCH = 64, 256, 2, 128, 16
KEEP = 0.5  # of the neurons, in an expert: the authors'
STEPS, ROUNDS, ROUTER_STEPS, MODEL_STEPS, SEEDS = 600, 5, 40, 80, 3
RATE, TUNING_RATE, ROUTER_RATE = 4e-3, 1e-3, 3e-3
HELD_OUT = 32  # rows of each domain
ROUTER = frugax.layers.DecoupledRouter(vocab_size=256, experts=4, width=32)


def domains() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The bytes of each domain, to train on and held out: every tenth file, or the last tenth of one."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {
        "code": sorted(library.glob("*.py")),
        "prose": [library / "pydoc_data" / "topics.py"],
        "tables": sorted((library / "encodings").glob("cp*.py")),
        "headers": sorted(Path(sysconfig.get_paths()["include"]).rglob("*.h")),
    }
    found = {}
    for name, paths in files.items():
        parts = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
        if len(parts) == 1:
            parts = np.array_split(parts[0], 10)
        held = [part for i, part in enumerate(parts) if i % 10 == 9]
        found[name] = np.concatenate([p for i, p in enumerate(parts) if i % 10 != 9]), np.concatenate(held)
    return found


class Channel(nn.Module):
    """A GLU whose neurons a mask [B, T, H] can turn off; returns its outputs and all activations."""

    @nn.compact
    def __call__(self, x: Any, mask: Any) -> tuple[Any, Any]:
        gate, value = jnp.split(nn.Dense(2 * HIDDEN, use_bias=False, name="gate_in")(x), 2, -1)
        h = jax.nn.silu(gate) * value
        return nn.Dense(WIDTH, use_bias=False, name="out")(h if mask is None else h * mask), h


class Model(nn.Module):
    """The language model; `masks` [layers, E, H] and a choice [B, T] turn neurons off.

    With `experts`, the widths of an expert and of the shared one in each layer, it has layers of `MoE`.
    """

    experts: tuple[tuple[int, int], ...] | None = None

    @nn.compact
    def __call__(self, tokens: Any, masks: Any = None, choice: Any = None) -> tuple[Any, Any]:
        x, activations = nn.Embed(256, WIDTH, name="embedding")(tokens), []
        for i in range(LAYERS):
            normed = frugax.layers.RMSNorm(name=f"mixer_norm_{i}")(x)
            x = x + frugax.layers.MLGRU(name=f"mixer_{i}")(normed)[0]
            normed = frugax.layers.RMSNorm(name=f"channel_norm_{i}")(x)
            if self.experts is None:
                y, h = Channel(name=f"channel_{i}")(normed, None if masks is None else masks[i][choice])
                activations.append(h)
            else:
                logits = 9.0 * jax.nn.one_hot(choice.reshape(-1), ROUTER.experts)
                own, shared = (width / WIDTH for width in self.experts[i])
                layer = frugax.layers.MoE(
                    experts=ROUTER.experts, k=1, expand=own, shared_expand=shared, name=f"channel_{i}"
                )
                y = layer(normed, routing=frugax.moe.softmax_top_k(logits, 1))  # one expert of weight 1
            x = x + y
        x = frugax.layers.RMSNorm(name="norm")(x)
        return nn.Dense(256, use_bias=False, name="head")(x), activations


def choose(router: Any, tokens: Any) -> Any:
    return jnp.argmax(ROUTER.apply({"params": router}, tokens)[0], -1)


def trainer(loss: Any, rate: float, steps: int) -> Any:
    """Make (params, rows [steps, ...], *more of the loss) -> params, by AdamW with a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, max(steps // 10, 1), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    def run(params, rows, *more):
        def step(carry, rows):
            params, state = carry
            grads = jax.grad(loss)(params, rows.astype(jnp.int32), *more)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), rows)[0][0]

    return jax.jit(run)


def model_loss(params: Any, rows: Any, masks: Any = None, router: Any = None) -> Any:
    """The model's own loss; with masks, each token has the neurons of the router's choice."""
    choice = None if masks is None else choose(router, rows[:, :-1])
    return bits(Model().apply({"params": params}, rows[:, :-1], masks, choice)[0], rows)


def router_loss(router: Any, rows: Any, params: Any, subsets: np.ndarray) -> Any:
    """The router's: labels from the neurons that the dense model activates."""
    tokens = rows[:, :-1]
    _, activations = Model().apply({"params": params}, tokens)
    overlaps = [frugax.moe.activation_overlap(h, s) for h, s in zip(activations, subsets, strict=True)]
    return frugax.moe.router_distillation(ROUTER.apply({"params": router}, tokens)[0], jnp.stack(overlaps))


class Batches:
    """Rows at random places of all domains alike, [steps, BATCH, LENGTH + 1]."""

    def __init__(self, data: dict[str, tuple[np.ndarray, np.ndarray]], seed: int):
        self.data, self.random = [train for train, _ in data.values()], np.random.default_rng(seed)

    def of(self, text: np.ndarray, rows: tuple[int, ...]) -> np.ndarray:
        starts = self.random.integers(len(text) - LENGTH - 1, size=(*rows, 1))
        return text[starts + np.arange(LENGTH + 1)]

    def __call__(self, steps: int) -> np.ndarray:
        each = [self.of(text, (steps, BATCH // len(self.data))) for text in self.data]
        return np.concatenate(each, 1)


def refactored(params: Any, subsets: np.ndarray) -> tuple[Model, Any]:
    """The model with layers of experts, and its params."""
    split = {
        f"channel_{i}": frugax.moe.split_neurons(params[f"channel_{i}"], s) for i, s in enumerate(subsets)
    }
    widths = tuple(
        (layer["experts"]["out"]["kernel"].shape[1], layer["shared"]["out"]["kernel"].shape[0])
        for layer in split.values()
    )
    return Model(widths), params | split


def by_lot(subsets: np.ndarray, seed: int) -> np.ndarray:
    """The same numbers of neurons and the same overlaps, of neurons drawn by lot."""
    random = np.random.default_rng(seed)
    return np.stack([layer[:, random.permutation(HIDDEN)] for layer in subsets])


def run(
    data: dict[str, tuple[np.ndarray, np.ndarray]],
    seed: int,
    steps: int,
    rounds: int,
    tuning: tuple[int, int],
) -> dict[str, Any]:
    """Held-out bits a byte by domain of each contender, of one seed."""
    draw = Batches(data, seed)
    held_out = {n: jnp.asarray(draw.of(held, (HELD_OUT,)), jnp.int32) for n, (_, held) in data.items()}
    key = jax.random.key(seed)
    dense = jax.jit(Model().init)(key, held_out["code"][:1, :-1])["params"]
    dense = trainer(model_loss, RATE, steps)(dense, draw(steps))

    strength = jax.jit(lambda rows: Model().apply({"params": dense}, rows[:, :-1])[1])
    activity = [
        [
            np.abs(h).mean((0, 1))
            for h in jax.device_get(strength(draw.of(train, (HELD_OUT,)).astype(np.int32)))
        ]
        for train, _ in data.values()
    ]
    layers = [np.stack(layer) for layer in zip(*activity, strict=True)]
    subsets = np.stack(
        [frugax.moe.split_by_activation(dense[f"channel_{i}"], a, KEEP)[1] for i, a in enumerate(layers)]
    )

    def measured(model, params, router=None):
        @jax.jit
        def of(rows):
            choice = None if router is None else choose(router, rows[:, :-1])
            return bits(model.apply({"params": params}, rows[:, :-1], None, choice)[0], rows)

        return {name: round(float(of(rows)), 4) for name, rows in held_out.items()}

    def spread(router):
        """Count how often each domain's tokens go to its own expert."""
        chosen = [np.asarray(choose(router, rows[:, :-1])) for rows in held_out.values()]
        return round(float(np.mean([(c == i).mean() for i, c in enumerate(chosen)])), 4)

    for_router, for_model = tuning
    found = {"dense": measured(Model(), dense)}
    fresh = jax.jit(ROUTER.init)(key, held_out["code"][:, :-1])["params"]
    batches = [(draw(for_router), draw(for_model)) for _ in range(rounds)]  # the same for all
    for name, chosen in (("by activation", subsets), ("random neurons", by_lot(subsets, seed))):
        masks = jnp.asarray(chosen, jnp.float32)
        tune_router = trainer(lambda r, x, p, s=chosen: router_loss(r, x, p, s), ROUTER_RATE, for_router)
        tune_model = trainer(model_loss, TUNING_RATE, for_model)
        params, router = dense, fresh
        for number, (rows, more) in enumerate(batches):
            router = tune_router(router, rows, params)
            if number == 0:
                found[f"{name}, not tuned"] = measured(*refactored(params, chosen), router)
            params = tune_model(params, more, masks, router)
        model, split = refactored(params, chosen)
        found[f"{name}, tuned"] = measured(model, split, router) | {"own expert": spread(router)}
        width, shared = np.mean(model.experts, 0)
        found[f"{name}, tuned"] |= {"active neurons": float(width + shared), "of them shared": float(shared)}
    tune, params = trainer(model_loss, TUNING_RATE, for_model), dense
    for _, more in batches:
        params = tune(params, more)
    return found | {"dense, tuned": measured(Model(), params)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args(argv)
    steps, rounds, tuning = (4, 1, (2, 2)) if args.smoke else (STEPS, ROUNDS, (ROUTER_STEPS, MODEL_STEPS))
    data, found = domains(), []
    for seed in range(1 if args.smoke else SEEDS):
        start = time.monotonic()
        found.append(run(data, seed, steps, rounds, tuning))
        for name, row in found[-1].items():
            print(f"seed {seed}  {name:28} {row}", flush=True)
        print(f"seed {seed}  {time.monotonic() - start:.0f} s", flush=True)
    if not args.smoke:
        rows = {n: {key: [f[n][key] for f in found] for key in found[0][n]} for n in found[0]}
        task: dict[str, Any] = {
            "steps": STEPS,
            "rounds": ROUNDS,
            "router_steps": ROUTER_STEPS,
            "model_steps": MODEL_STEPS,
        }
        task |= {"seeds": SEEDS, "hidden": HIDDEN, "keep": KEEP}
        args.out.write_text(json.dumps(about() | task | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
