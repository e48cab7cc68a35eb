"""Fine-tune in full or by LoRA, in float32 or bfloat16, and say how far apart the models end."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.trainer.state import bits_per_byte
from frugax.memory import state_on_host
from frugax.peft import lora_apply, lora_init, lora_merge


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: it is a static argument, and holds arrays
class Adapted:
    """A module whose params are LoRA adapters of fixed ones; `apply` as a module's."""

    module: Any
    fixed: Any

    def apply(self, variables, *args, **kwargs):
        return lora_apply(self.module, {"params": self.fixed}, variables["params"], *args, **kwargs)


def tune(module, params, batches, rate: float, *, paged: bool = False) -> tuple[Any, list[float]]:
    """AdamW on every batch once: the new params, and each loss in nats a byte.

    `paged` keeps the optimizer's state in the host's memory between steps.
    """
    schedule = optax.warmup_cosine_decay_schedule(0, rate, max(len(batches) // 10, 1), len(batches))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    optimizer = state_on_host(optimizer) if paged else optimizer

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            logits, _ = module.apply({"params": params}, batch["tokens"], segment_ids=batch["segment_ids"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for batch in batches:
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    return params, losses


def logits_of(module, params, tokens_RT) -> Array:
    return jax.jit(lambda p: module.apply({"params": p}, tokens_RT)[0])(params)


def deviation(logits, reference) -> np.ndarray:
    """|logits - reference| / |reference| at each position [T], less what softmax ignores: their means."""
    a, b = (np.asarray(x, np.float64) for x in (logits, reference))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return np.sqrt(((a - b) ** 2).sum((0, 2)) / (b**2).sum((0, 2)))


def compare_tuning(module, params, targets, batches, held_out, tokens_RT, rank: int, rates, say):
    """Full and LoRA fine-tuning in both dtypes: bits per byte, and how far apart they end.

    Returns:
      {"full float32": {...}, ...}, and the params that LoRA in bfloat16 ends with, merged.
    """
    rows: dict[str, dict[str, Any]] = {}
    ends: dict[str, tuple] = {}
    for method in ("full", "lora"):
        for dtype in ("float32", "bfloat16"):
            start, name = time.monotonic(), f"{method} {dtype}"
            cast = module.clone(dtype=jnp.dtype(dtype))
            if method == "full":
                learner, first = cast, params
            else:
                learner = Adapted(cast, params)
                first = lora_init(jax.random.key(1), params, targets=targets, rank=rank)
            tuned, losses = tune(learner, first, batches, rates[method])
            bits = bits_per_byte(learner, tuned, held_out)
            ends[name] = logits_of(learner, tuned, tokens_RT), bits, losses
            rows[name] = {
                "trained_parameters": sum(x.size for x in jax.tree.leaves(tuned)),
                "held_out_bits_per_byte": round(bits, 4),
            }
            for other in ("full float32", f"{method} float32"):
                if other != name:
                    rows[name][f"from {other}"] = distance(ends[name], ends[other])
            say(f"  {name}: {bits:.4f} bits per byte, {time.monotonic() - start:.0f} s")
    return rows, lora_merge(params, tuned)


def distance(end, other) -> dict[str, float]:
    """Between two fine-tuned models: logits (relative), held-out bits per byte, training losses in nats."""
    return {
        "logits": figures(deviation(end[0], other[0]).mean()),
        "bits_per_byte": round(end[1] - other[1], 4),
        "largest_training_loss": figures(np.abs(np.subtract(end[2], other[2])).max()),
    }


def figures(x) -> float:
    """Rounded to four figures."""
    return float(f"{float(x):.4g}")
