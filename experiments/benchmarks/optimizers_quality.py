"""Every optimizer of experiments/configs/optimizers/llama_1m.py at each learning rate of its grid.

  python -m experiments.benchmarks.optimizers_quality              about an hour on a core
  python -m experiments.benchmarks.optimizers_quality --only adamw galore --steps 200
  python -m experiments.benchmarks.optimizers_quality --smoke      every part in a minute or two, kept nowhere

The same init and the same batches for all. Results are written after each run; a run that is there already is
not repeated, unless --again; one at a rate that has left the grid goes when the next result is written. Times
are not among them: benchmarks/optimizer_step_cpu.py measures those.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import optax

import frugax
from experiments.benchmarks.interleaved import about, write
from experiments.benchmarks.training import prepare
from experiments.configs.optimizers.llama_1m import OPTIMIZERS, get_config
from experiments.data import heldout_batches
from experiments.trainer.state import bits_per_byte

EACH = 2048  # bytes of a held-out file
RESULTS = Path(__file__).parent / "results" / "optimizers_quality.json"


def run(config) -> dict:
    """Train as `config` says, without checkpoints; what it reached and what it cost."""
    tokenizer, corpus, batches, module, state, compiled = prepare(config)
    memory = compiled.memory_analysis()
    losses = []
    for _ in range(config.steps):
        state, metrics = compiled(state, dict(next(batches)))
        losses.append(float(metrics["loss"]))
    # The first bytes of many files say more than the one file that would fill the limit.
    spans = tuple(dataclasses.replace(s, stop=s.start + min(len(s), EACH)) for s in corpus.heldout)
    held_out = heldout_batches(
        dataclasses.replace(corpus, heldout=spans),
        tokenizer,
        batch_size=config.evaluation.batch_size,
        sequence_length=config.evaluation.sequence_length,
        limit_bytes=config.evaluation.max_bytes,
    )
    return {
        "steps": config.steps,
        "bytes_a_step": config.batch_size * config.data.sequence_length,
        "training_loss": round(float(np.mean(losses[-max(config.steps // 20, 1) :])), 4),
        "held_out_bits_per_byte": round(float(bits_per_byte(module, state.params, held_out)), 4),
        "parameters": int(optax.tree.size(state.params)),
        "state_bytes": frugax.optim.state_bytes(state.optimizer),
        "peak_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    }


def table(runs: dict[str, dict]) -> str:
    """The best run of each optimizer, by held-out bits per byte."""
    lines = ["optimizer       rate    loss    bits/byte  state MB  peak MB  others"]
    for name in OPTIMIZERS:
        mine = sorted((r["held_out_bits_per_byte"], rate, r) for rate, r in runs.get(name, {}).items())
        if not mine:
            continue
        bits, rate, best = mine[0]
        others = ", ".join(f"{rate}: {bits:.3f}" for bits, rate, _ in mine[1:])
        lines.append(
            f"{name:14}  {rate:6}  {best['training_loss']:.3f}  {bits:9.3f}  "
            f"{best['state_bytes'] / 1e6:8.2f}  {best['peak_bytes'] / 1e6:7.1f}  {others}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, help="of each run; default: the config's")
    parser.add_argument("--smoke", action="store_true", help="the smallest model, at the middle rate")
    parser.add_argument("--again", action="store_true", help="repeat runs that the file has")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    kept = args.out.exists() and not args.smoke
    result = json.loads(args.out.read_text()) if kept else {"runs": {}}
    result |= about()
    for name in args.only:
        rates = OPTIMIZERS[name][2]
        before = result["runs"].get(name, {})
        done = result["runs"][name] = {rate: r for rate, r in before.items() if float(rate) in rates}
        for rate in (rates[1],) if args.smoke else rates:
            config = get_config(f"{name},smoke" if args.smoke else name)
            config.optimizer.learning_rate = rate
            if args.steps:
                config.steps = args.steps
                config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, args.steps // 10)
            if str(rate) in done and done[str(rate)]["steps"] == config.steps and not args.again:
                continue
            done[str(rate)] = run(config)
            print(name, rate, done[str(rate)], flush=True)
            if args.smoke:
                continue
            write(args.out, result)
    print(table(result["runs"]))


if __name__ == "__main__":
    main()
