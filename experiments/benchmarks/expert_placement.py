"""Tokens and bytes of eight devices with skewed experts: with copies of the busy ones, without, and with all.

  python -m experiments.benchmarks.expert_placement              seconds on a core; writes the JSON

Experts' popularity is skewed and drifts from step to step. What is counted is where `route_to_copies` sends
tokens after `plan_placement`, whose only knowledge is the mean load of the five steps before. Bytes are those
of one layer's forward pass, of the device that receives most, where only what is needed is sent (the ragged
transport); a backward pass moves as many.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import frugax
from experiments.benchmarks.interleaved import about

RESULTS = Path(__file__).parent / "results" / "expert_placement.json"
DEVICES, EXPERTS, K, TOKENS, STEPS, SEEN = 8, 64, 2, 2048, 60, 5
WIDTH, HIDDEN, ITEMSIZE = 2048, 1024, 2
EXPERT_BYTES, TOKEN_BYTES = 3 * WIDTH * HIDDEN * ITEMSIZE, WIDTH * ITEMSIZE


@jax.jit
def choices(popularity: jax.Array, key: jax.Array) -> frugax.moe.Routing:
    """The routing of each device's tokens, to the K largest of popularity and noise."""
    noise = jax.random.gumbel(key, (DEVICES, TOKENS, EXPERTS))
    return jax.vmap(partial(frugax.moe.softmax_top_k, k=K))(popularity + noise)


@jax.jit
def sent(routing: frugax.moe.Routing, copies: jax.Array) -> jax.Array:
    """Tokens from each device to each, [P, P]."""

    def of(routing, device):
        to = frugax.parallel.route_to_copies(routing, copies, device)
        return jnp.bincount(to.indices.reshape(-1) // (to.experts // DEVICES), length=DEVICES)

    return jax.vmap(of)(routing, jnp.arange(DEVICES))


def loads(steps: int = STEPS) -> tuple[list[Any], np.ndarray]:
    """Routings of so many steps, and the tokens of each expert in each."""
    rng = np.random.default_rng(0)
    popularity = rng.standard_normal(EXPERTS)
    routings, counts = [], []
    for step in range(steps):
        popularity = 0.995 * popularity + 0.1 * rng.standard_normal(EXPERTS)
        routings.append(choices(jnp.array(popularity, jnp.float32), jax.random.key(step)))
        counts.append(np.bincount(np.asarray(routings[-1].indices).reshape(-1), minlength=EXPERTS))
    return routings, np.array(counts)


def summary(matrices: list[np.ndarray], copies: list[np.ndarray]) -> dict[str, float]:
    """Means over steps of what the busiest device has to do and to receive."""
    mean = TOKENS * K
    busiest = np.array([m.sum(0).max() / mean for m in matrices])
    away = [m * (1 - np.eye(DEVICES, dtype=int)) for m in matrices]
    tokens = [(a.sum(0) + a.sum(1)).max() * TOKEN_BYTES for a in away]  # to experts, and back
    gathered = [(c >= 0).sum(1).max() * EXPERT_BYTES for c in copies]
    return {
        "busiest_over_mean": round(float(busiest.mean()), 3),
        "worst_step": round(float(busiest.max()), 3),
        "token_MB": round(float(np.mean(tokens)) / 1e6, 1),
        "expert_MB": round(float(np.mean(gathered)) / 1e6, 1),
    }


def rows(steps: int = STEPS, slots: tuple[int, ...] = (1, 2, 4, 8)) -> dict[str, dict[str, float]]:
    """Each way's summary."""
    routings, counts = loads(steps + SEEN)
    none = np.full((DEVICES, 1), -1, np.int32)
    ways: dict[str, list[np.ndarray]] = {"no copies": [none] * steps}
    for n in slots:
        plan = jax.jit(partial(frugax.parallel.plan_placement, devices=DEVICES, slots=n))
        means = [counts[t : t + SEEN].mean(0) for t in range(steps)]
        label = f"{n} {'copy' if n == 1 else 'copies'} a device"
        ways[label] = [np.asarray(plan(jnp.array(m, jnp.float32))) for m in means]
        if n == slots[-1]:
            known = [np.asarray(plan(jnp.array(c, jnp.float32))) for c in counts[SEEN:]]
            ways[f"{label}, of known loads"] = known
    found = {}
    for name, copies in ways.items():
        matrices = [np.asarray(sent(r, jnp.array(c))) for r, c in zip(routings[SEEN:], copies, strict=True)]
        assert all(m.sum() == DEVICES * TOKENS * K for m in matrices), "a token was lost"
        found[name] = summary(matrices, copies)
        print(name, found[name], flush=True)
    everywhere = (EXPERTS - EXPERTS // DEVICES) * EXPERT_BYTES
    found["all experts everywhere"] = {
        "busiest_over_mean": 1.0,
        "worst_step": 1.0,
        "token_MB": 0.0,
        "expert_MB": round(everywhere / 1e6, 1),
    }
    return found


def main() -> None:
    what = f"{EXPERTS} experts of {WIDTH} x {HIDDEN} in bfloat16 on {DEVICES} devices, {TOKENS} tokens each, "
    what += f"{K} experts a token, {STEPS} steps"
    RESULTS.write_text(json.dumps(about() | {"model": what, "rows": rows()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
