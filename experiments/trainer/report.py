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
    variables: tuple[Any, dict[str, Any]],
    corpus: Corpus,
    tokenizer: Tokenizer,
    times: dict[str, float],
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Evaluate, sample, print, and write RUN/summary.json, RUN/sample.txt and RUN/loss.png.

    Args:
      config: the run's; its evaluation or its sample may be turned off.
      module: the language model.
      state: of the last step, for its sizes.
      variables: the params to use (their average, if the run keeps one) and the collections beside them.
      corpus: evaluated where something of it is held out.
      tokenizer: the run's.
      times: compile_seconds, training_seconds, steps; empty where this process took no step. And the best
        checkpoint, where some were evaluated.
      say: prints a line.

    Returns:
      What summary.json holds.
    """
    params, collections = variables
    start = time.monotonic()
    comparison = None
    if config.evaluation.enabled and corpus.heldout:
        comparison = compare(module, params, corpus, tokenizer, config.evaluation, collections=collections)
    evaluation_seconds = time.monotonic() - start
    text = ""
    if config.sample.tokens:
        pieces = sample_text(
            module,
            {"params": params, **collections},
            tokenizer,
            config.sample.prompt,
            steps=config.sample.tokens,
            temperature=config.sample.temperature,
            key=jax.random.key(config.seed),
        )
        text = config.sample.prompt + "".join(pieces)

    summary: dict[str, Any] = {}
    if comparison:
        summary = {
            "held_out_bits_per_byte": comparison.model,
            "gzip_bits_per_byte": comparison.gzip,
            "order3_bits_per_byte": comparison.order3,
            "held_out_bytes": comparison.num_bytes,
        }
        if comparison.lost:
            summary["bytes_lost_by_the_tokenizer"] = comparison.lost
    summary |= {
        "step": int(state.step),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "parameter_bytes": tree_bytes(state.params),
        "optimizer_state_bytes": tree_bytes(state.optimizer),
        **{name: round(x, 2) if name.endswith("_seconds") else x for name, x in times.items()},
        "evaluation_seconds": round(evaluation_seconds, 2),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    run_dir = Path(config.run_dir)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if text:
        (run_dir / "sample.txt").write_text(text + "\n", encoding="utf-8", errors="replace")
    lines = {}
    if comparison:
        lines = {"held out": comparison.model, "gzip -9": comparison.gzip, "order-3 bytes": comparison.order3}
    picture = plot_loss(run_dir, lines)

    say(f"\n{comparison}" if comparison else "\nnot evaluated: nothing is held out, or evaluation is off")
    if "best_step" in times:
        say(f"best of those evaluated: step {times['best_step']}, {times['best_held_out_bits_per_byte']:.4f}")
    sizes = [f"{tree_bytes(tree) / 1e6:.1f} MB" for tree in (state.params, state.optimizer)]
    say(f"parameters: {summary['parameters']:,}, {sizes[0]}; the optimizer's state {sizes[1]}")
    for name in sorted(name for name in summary if name.endswith("_seconds")):
        say(f"{name}: {summary[name]}")
    if text:
        say(f"a sample:\n{text.encode(errors='replace').decode()}\n")
    found = [f"{name}, " for name, there in (("loss.png", picture), ("sample.txt", text)) if there]
    say(f"{''.join(found)}summary.json, metrics.jsonl and tensorboard are in {run_dir}")
    return summary
