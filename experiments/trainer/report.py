"""The report on a finished run: held-out bits per byte beside compressors, sizes, times, and a sample."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.data import Corpus, Tokenizer
from experiments.evaluate import compare
from experiments.trainer.metrics import plot_loss
from experiments.trainer.sampling import sample_text
from experiments.trainer.state import TrainState


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def report(
    config: ConfigDict,
    module: Any,
    state: TrainState,
    corpus: Corpus,
    tokenizer: Tokenizer,
    times: dict[str, float],
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Evaluate, sample, print, and write RUN/summary.json, RUN/sample.txt and RUN/loss.png.

    Args:
      state: of the last step; its moving average is what is evaluated, if the run keeps one.
      times: compile_seconds, training_seconds, steps; empty where this process took no step.
      say: prints a line.

    Returns:
      What summary.json holds.
    """
    params = state.params if state.ema is None else state.ema
    start = time.monotonic()
    comparison = compare(module, params, corpus, tokenizer, config.evaluation)
    evaluation_seconds = time.monotonic() - start
    pieces = sample_text(
        module,
        {"params": params},
        tokenizer,
        config.sample.prompt,
        steps=config.sample.tokens,
        temperature=config.sample.temperature,
        key=jax.random.key(config.seed),
    )
    text = config.sample.prompt + "".join(pieces)

    summary = {
        "held_out_bits_per_byte": comparison.model,
        "gzip_bits_per_byte": comparison.gzip,
        "order3_bits_per_byte": comparison.order3,
        "held_out_bytes": comparison.num_bytes,
        "step": int(state.step),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "parameter_bytes": tree_bytes(state.params),
        "optimizer_state_bytes": tree_bytes(state.optimizer),
        **{name: round(seconds, 2) for name, seconds in times.items()},
        "evaluation_seconds": round(evaluation_seconds, 2),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    run_dir = Path(config.run_dir)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (run_dir / "sample.txt").write_text(text + "\n", encoding="utf-8")
    lines = {"held out": comparison.model, "gzip -9": comparison.gzip, "order-3 bytes": comparison.order3}
    picture = plot_loss(run_dir, lines)

    say(f"\n{comparison}")
    sizes = [f"{tree_bytes(tree) / 1e6:.1f} MB" for tree in (state.params, state.optimizer)]
    say(f"parameters: {summary['parameters']:,}, {sizes[0]}; the optimizer's state {sizes[1]}")
    for name in sorted(name for name in summary if name.endswith("_seconds")):
        say(f"{name}: {summary[name]}")
    say(f"a sample:\n{text}\n")
    say(f"{picture}, summary.json, sample.txt, metrics.jsonl and tensorboard are in {run_dir}")
    return summary
