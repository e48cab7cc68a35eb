"""Fine-tune a trained language model by LoRA, its matrices in 16 bits or in few.

  python -m experiments.train --config=experiments/configs/low_bit/mlgru.py      the model, two minutes
  python -m experiments.studies.qlora --run=runs/mlgru                           three more

The model was trained on Python; it is tuned on the C headers of this interpreter, and every tenth file is
held out. Adapters stand by every matrix of every layer, as QLoRA has them, and are trained alone, by AdamW.

Source: Dettmers et al. 2023, QLoRA (arXiv 2305.14314), which finds 4-bit bases as good as 16-bit ones.
"""

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.interleaved import about, save
from experiments.data import find_corpus, heldout_batches, load_tokenizer, make_loader
from experiments.studies.tuning import Adapted, tune
from experiments.trainer.checkpoints import CheckpointError
from experiments.trainer.runs import load_run
from experiments.trainer.state import bits_per_byte
from frugax.peft import lora_count, lora_init
from frugax.quant import quantize_params

# The bases, from the widest down, with group sizes where a format has none of its own.
BASES = {
    **{"float32": None, "bfloat16": None, "int8": ("int8", 64), "nf4": "nf4", "nf4_dq": "nf4_dq"},
    **{"fp4_e2m1": ("fp4_e2m1", 64), "int4": ("int4", 64), "int3": ("int3", 64)},
}


def compare(
    module,
    params,
    batches,
    held_out,
    *,
    bases: Iterable[str],
    rank: int,
    rate: float,
    paged: bool = False,
    say: Callable = print,
) -> list[dict[str, Any]]:
    """Tune adapters of every matrix beside each base: a row of bytes and bits per byte for each."""
    targets = tuple(
        {_layer(path) for path, _ in jax.tree_util.tree_leaves_with_path(params) if _is_kernel(path)}
    )
    rows = []
    for name in bases:
        start = time.monotonic()
        base, mine = params, module
        if name == "bfloat16":
            base, mine = (
                jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
                module.clone(dtype=jnp.bfloat16),
            )
        elif BASES[name] is not None:
            base, _ = quantize_params(params, {"kernel$": BASES[name]})
        kernels = [
            x
            for path, x in jax.tree_util.tree_leaves_with_path(base)
            if "kernel" in jax.tree_util.keystr(path)
        ]
        adapters = lora_init(jax.random.key(1), base, targets=sorted(targets), rank=rank, dtype=jnp.float32)
        learner = Adapted(mine, base)
        before = bits_per_byte(learner, adapters, held_out)
        tuned, losses = tune(learner, adapters, batches, rate, paged=paged)
        after = bits_per_byte(learner, tuned, held_out)
        assert before is not None  # nothing stops them
        assert after is not None
        rows.append(
            {
                "base": name,
                "bytes_of_matrices": sum(x.nbytes for x in kernels),
                "adapter_parameters": lora_count(adapters),
                "bits_per_byte_before": round(before, 4),
                "bits_per_byte_after": round(after, 4),
                "last_training_loss": round(float(np.mean(losses[-10:])), 4),
            }
        )
        say(f"  {name:9} {before:.4f} -> {after:.4f} bits per byte, {time.monotonic() - start:.0f} s")
    return rows


def _is_kernel(path) -> bool:
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


def _layer(path) -> str:
    """The end of a kernel's path that names it in every layer, such as "mixer/out"."""
    return jax.tree_util.keystr(path[-3:-1], simple=True, separator="/")


def run(args) -> dict[str, Any]:
    """The whole comparison, ready for JSON."""
    config, module, variables, tokenizer_path, step = load_run(args.run)
    tokenizer, corpus = load_tokenizer(tokenizer_path), find_corpus(args.data, heldout=0.1)
    length = config.data.sequence_length
    loader = make_loader(corpus, tokenizer, batch_size=4, sequence_length=length, seed=0)
    batches = [dict(next(loader)) for _ in range(args.steps)]
    held_out = heldout_batches(
        corpus, tokenizer, batch_size=4, sequence_length=length, limit_bytes=args.max_bytes or None
    )
    how = {"bases": args.bases, "rank": args.rank, "rate": args.rate, "paged": args.paged}
    rows = compare(module, variables["params"], batches, held_out, **how)
    return {
        "model": {"config": Path(args.run).name, "step": step},
        "steps": args.steps,
        "rank": args.rank,
        "learning_rate": args.rate,
        "held_out_bytes": int(sum(b["bytes"].sum() for b in held_out)),
        "rows": rows,
    }


def main(arguments=None) -> None:
    """Read the command line, run, print and write."""
    parser = argparse.ArgumentParser(
        prog="experiments.studies.qlora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", default="runs/mlgru", help="the run's folder (default: %(default)s)")
    parser.add_argument("--data", default=sysconfig.get_paths()["include"], help="the text to tune on")
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--paged", action="store_true", help="keep the optimizer's state on the host")
    parser.add_argument("--max_bytes", type=int, default=0, help="of held-out text; 0: all")
    parser.add_argument("--out", type=Path, help="the JSON to write; default: none, it is printed")
    args = parser.parse_args(arguments)
    try:
        result = about() | run(args)
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"experiments.studies.qlora: {error}")
    if args.out:
        save(args.out, result)
    else:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
