"""The parallel block beside the serial one, in small language models: held-out bits a byte.

  python -m experiments.studies.parallel_block              minutes on two cores; writes the JSON
  python -m experiments.studies.parallel_block --smoke              both for a few steps; writes nothing

The models read bytes of the standard library: four layers, 96 wide, of a mixer and a GLU of twice the width.
A parallel block has one norm less, 96 params of a layer; all else is the same, and runs of one seed share
batches and the params that they have in common, so a gap is of one seed and its spread is over seeds.

Source: Jiang et al. 2024, MegaScale (arXiv 2402.15627), section 3.1, after GPT-J and PaLM.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import frugax
from experiments.benchmarks.interleaved import about
from experiments.studies.low_bit_training import BATCH, LENGTH, RATE, batches, text, train

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "parallel_block.json"
STEPS, SEEDS, WIDTH, LAYERS = 300, 3, 96, 4
MIXERS: dict[str, dict[str, Any]] = {
    "SlidingWindowAttention": {"heads": 4, "window": 32},
    "GatedLinearAttention": {"heads": 4},
}


def run(mixer: str, parallel: bool, data: np.ndarray, held_out: np.ndarray, steps: int, seeds: int) -> dict:
    """Params of a model with such blocks, and the held-out bits a byte of each seed."""
    block = frugax.layers.Block(mixer, "GLU", MIXERS[mixer], {"expand": 2.0}, parallel=parallel)
    module = frugax.layers.Decoder(256, WIDTH, (block,), repeats=LAYERS, tie_embeddings=False)
    rows = np.stack([batches(data, seed, steps) for seed in range(seeds)])
    together = jax.jit(jax.vmap(train(module, steps), in_axes=(0, 0, None)))
    reached = together(jnp.arange(seeds), rows, held_out)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return {
        "mixer": mixer,
        "block": "parallel" if parallel else "serial",
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "held_out_bits_per_byte": [round(float(x), 4) for x in reached],
    }


def gap(serial: list[float], parallel: list[float]) -> dict[str, float]:
    """The parallel block's mean gap to the serial one, and its standard error over seeds."""
    differences = np.subtract(parallel, serial)
    error = differences.std(ddof=1) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return {"gap": round(float(differences.mean()), 4), "standard_error": round(float(error), 4)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="both blocks for a few steps; writes nothing")
    parser.add_argument("--only", default="", help="a mixer by name, added to the JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args(argv)
    steps, seeds, mixers = (3, 1, ["SlidingWindowAttention"]) if args.smoke else (STEPS, SEEDS, list(MIXERS))
    mixers = [args.only] if args.only else mixers
    data, held_out = text()
    task = {"layers": LAYERS, "width": WIDTH, "steps": steps, "seeds": seeds, "learning_rate": RATE}
    task |= {"batch": BATCH, "length": LENGTH}
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.only else []
    for mixer in mixers:
        for parallel in (False, True):
            start = time.monotonic()
            row = run(mixer, parallel, data, held_out, steps, seeds)
            seconds = time.monotonic() - start
            bits = row["held_out_bits_per_byte"]
            print(f"{mixer:24} {row['block']:8} {bits} bits a byte, {seconds:.0f} s", flush=True)
            rows.append(row)
        row |= gap(rows[-2]["held_out_bits_per_byte"], bits)
        if not args.smoke:
            args.out.write_text(json.dumps(about() | task | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
