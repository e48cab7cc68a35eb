"""Experts below one bit a weight: ternary by GPTQ, in codewords of a dictionary; bits and errors of each way.

  python -m experiments.train --config=experiments/studies/qmoe.py --run=runs/qmoe     the model, ten minutes
  python -m experiments.studies.qmoe --run=runs/qmoe                                   two minutes more

The weights of each output of an expert become their least, zero and their greatest: by rounding to the
nearest, and by GPTQ with statistics of the tokens that the expert was sent. Errors are of the outputs of
every matrix, on held-out tokens that reach the expert in the model as it was; bits per byte are those of the
model with all of its experts packed, and the rest as it was.

Source: Frantar & Alistarh 2023, QMoE (arXiv 2310.16795).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.benchmarks.interleaved import about, save
from experiments.configs.moe import moe_bytes
from experiments.data import find_corpus, heldout_batches, load_tokenizer, make_loader
from experiments.trainer.checkpoints import CheckpointError
from experiments.trainer.runs import load_run
from experiments.trainer.state import bits_per_byte
from frugax.compress import compress_ternary
from frugax.formats import QuantizedTensor, quantize
from frugax.quant import Statistics, calibrate, output_error, qmoe, quantize_params

EXPERTS = "experts/"


def get_config(variant: str = "") -> ConfigDict:
    """One layer of eight experts, wide enough for rows of codewords, trained by AdamW on bytes.

    Strong decay lets little stay of the initial weights, whose tails are cut off.
    """
    config = moe_bytes.get_config(variant)
    config.steps, config.batch_size = 800, 2
    config.model.width, config.model.repeats = 512, 1
    with config.unlocked():
        config.optimizer.options = ConfigDict()
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 0.004
    config.optimizer.weight_decay = 1.0
    config.evaluation.max_bytes = 100_000
    return config


def matrices(tree: Any) -> dict[str, Any]:
    """The experts' kernels of params, packed or not, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {path: leaf for path, leaf in named.items() if EXPERTS in path}


def entropy(zeros: float) -> float:
    """Bits of a trit that is zero with this probability, and else one of two with equal ones."""
    shares = np.array([zeros, (1 - zeros) / 2, (1 - zeros) / 2])
    return float(-(shares * np.log2(np.maximum(shares, 1e-30))).sum())


def sizes(packed: Any) -> dict[str, float]:
    """Bits a weight of all experts: codewords, row offsets and values; and how many weights are zero."""
    bits = {"codewords": 0, "offsets": 0, "values": 0}
    weights, zeros, bound = 0, 0, 0.0
    for q in matrices(packed).values():
        w = compress_ternary(q)
        assert np.array_equal(w.decode(), q.dequantize())  # without loss
        bits["codewords"] += 8 * w.codes.nbytes
        bits["offsets"] += 8 * w.offsets.nbytes
        bits["values"] += 8 * (w.low.nbytes + w.high.nbytes)
        none = int(np.sum(np.asarray(q.unpacked()) == 0))
        weights, zeros, bound = weights + q.size, zeros + none, bound + q.size * entropy(none / q.size)
    rows = {name: round(n / weights, 4) for name, n in bits.items()}
    rows["bits_per_weight"] = round(sum(bits.values()) / weights, 4)
    return rows | {"zeros": round(zeros / weights, 4), "entropy": round(bound / weights, 4)}


def compare(module, params, batches, held_out, *, say=print) -> dict[str, Any]:
    """Pack the experts each way, and measure.

    Args:
      batches: tokens that statistics are taken of.
      held_out: batches that errors and bits per byte are measured on.
    """
    statistics = calibrate(module, {"params": params}, batches, only=EXPERTS)
    new = calibrate(module, {"params": params}, [jnp.asarray(b["tokens"]) for b in held_out], only=EXPERTS)
    rules = {
        "nearest": lambda path, w: quantize(w, "ternary_minmax", axis=-2),
        "nearest, mean magnitude": lambda path, w: quantize(w, "ternary", axis=-2),
        "gptq": lambda path, w: qmoe(w, statistics[path]),
    }
    wide = {path: w for path, w in matrices(params).items()}
    before = bits_per_byte(module, params, held_out)
    assert before is not None  # nothing stops it
    rows = [{"method": "none", "bits_per_weight": 32.0, "bits_per_byte": round(before, 4)}]
    for name, rule in rules.items():
        packed, _ = quantize_params(params, {EXPERTS: rule})
        errors = [mean_error(wide[path], q, new[path]) for path, q in matrices(packed).items()]
        bits = bits_per_byte(module, packed, held_out)
        assert bits is not None
        row = {"method": name, "output_error": round(float(np.mean(errors)), 4)}
        rows.append(row | {"bits_per_byte": round(bits, 4)} | sizes(packed))
        say(json.dumps(rows[-1]))
    count = next(iter(statistics.values())).count
    return {
        "expert_weights": sum(w.size for w in wide.values()),
        "shapes": {path: list(w.shape) for path, w in wide.items()},
        "tokens_of_an_expert": {"fewest": int(np.min(count)), "most": int(np.max(count))},
        "dictionary_bytes": 2**16 * 8,
        "rows": rows,
    }


def mean_error(w: Any, q: QuantizedTensor, statistics: Statistics) -> float:
    """The mean over experts of the relative error of a matrix's outputs."""
    return float(np.mean(output_error(w, q, statistics)))


def run(args) -> dict[str, Any]:
    """The whole comparison, ready for JSON."""
    config, module, variables, tokenizer_path, step = load_run(args.run)
    tokenizer, corpus = (
        load_tokenizer(tokenizer_path),
        find_corpus(config.data.path or None, heldout=config.data.held_out),
    )
    length = config.data.sequence_length
    loader = make_loader(corpus, tokenizer, batch_size=4, sequence_length=length, seed=1)
    batches = [jnp.asarray(next(loader)["tokens"]) for _ in range(args.batches)]
    held_out = heldout_batches(
        corpus, tokenizer, batch_size=4, sequence_length=length, limit_bytes=args.max_bytes
    )
    found = compare(module, variables["params"], batches, held_out)
    return {
        "model": {"config": Path(args.run).name, "step": step},
        "calibration_tokens": int(sum(b.size for b in batches)),
        "held_out_bytes": int(sum(np.sum(b["bytes"]) for b in held_out)),
    } | found


def main(arguments=None) -> None:
    """Read the command line, run, print and write."""
    parser = argparse.ArgumentParser(
        prog="experiments.studies.qmoe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", default="runs/qmoe", help="the run's folder (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=16, help="of 4 rows of training text, for statistics")
    parser.add_argument("--max_bytes", type=int, default=50_000, help="of held-out text")
    parser.add_argument("--out", type=Path, help="the JSON to write; default: none, it is printed")
    args = parser.parse_args(arguments)
    try:
        result = about() | run(args)
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"experiments.studies.qmoe: {error}")
    if args.out:
        save(args.out, result)
    else:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
