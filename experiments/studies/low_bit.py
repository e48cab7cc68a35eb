"""A trained decoder in few bits: held-out bits per byte, bytes and speed of every format and method.

  python -m experiments.train --config=experiments/configs/lm/quickstart.py     the model, five minutes
  python -m experiments.studies.low_bit --run=runs/quickstart                   the table, ten minutes
  ... --formats int4 --methods gptq --out=X                                     these, into the rows of X

Every matrix of every layer is packed: by rounding to the nearest, by GPTQ, or by AWQ, both with statistics of
training text; by sequential GPTQ, those of each block once the blocks before it are packed, as its authors
have it. The embedding and the head are in int8. The packed model runs as it is stored. Held-out text is
what the run held out. A model that was trained in ternary is packed without loss with --ternary=RUN.

Source: Frantar et al. 2022, GPTQ (arXiv 2210.17323); Lin et al. 2023, AWQ (arXiv 2306.00978).
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.benchmarks.interleaved import about, milliseconds, save
from experiments.data import find_corpus, heldout_batches, load_tokenizer, make_loader
from experiments.trainer.checkpoints import CheckpointError
from experiments.trainer.runs import load_run
from experiments.trainer.state import bits_per_byte
from frugax import formats, quant

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "low_bit.json"

# Formats with the group size that is given to those without one of their own.
FORMATS = {
    **{name: 32 for name in ("int8", "int4", "int3", "int2", "uint4", "uint3", "uint2")},
    **{name: None for name in ("nf4", "mxfp4", "nvfp4", "mxfp8", "fp8_e4m3")},
}
METHODS = ("nearest", "gptq", "gptq_sequential", "awq")
ROWS = "(^|/)(embedding|head)$"  # arrays [V, D], without statistics of their own


class Row(NamedTuple):
    """One way to store the model.

    Attributes:
      format, method: their names; "bfloat16" and "none" for the model as it was.
      held_out_bits_per_byte: of all held-out text read.
      bytes: that params take.
      output_error: ||X W - X Q|| / ||X W||, the mean over matrices; None where W was changed before.
    """

    format: str
    method: str
    held_out_bits_per_byte: float
    bytes: int
    output_error: float | None = None


def nearest(params, statistics, format: str, group_size: int | None):
    """Every matrix rounded to the nearest."""
    return quant.quantize_params(params, {"kernel$": _rule(format, group_size), ROWS: "int8"})[0]


def gptq(params, statistics, format: str, group_size: int | None):
    """GPTQ, with the scales of static groups."""

    def pack(path, w):
        return quant.gptq(w, statistics[path], format, group_size=group_size)

    return quant.quantize_params(params, {"kernel$": pack, ROWS: "int8"})[0]


def gptq_sequential(module, batches, params, format: str, group_size: int | None):
    """GPTQ with the inputs that a matrix has once all blocks before it are quantized."""

    def pack(path, w, statistics):
        return quant.gptq(w, statistics, format, group_size=group_size)

    statistics = quant.calibrate(module, {"params": params}, batches, quantize=pack)
    return gptq(params, statistics, format, group_size)


def awq(params, statistics, format: str, group_size: int | None):
    """AWQ: scales in what comes before a matrix where that is linear; ranges searched for every matrix."""
    folded, rest = fold_awq(params, statistics, format, group_size)

    def pack(path, w):
        clipped = quant.clip_weights(w, rest[path], format, group_size=group_size)
        return formats.quantize(clipped, format, axis=-2, group_size=group_size)

    return quant.quantize_params(folded, {"kernel$": pack, ROWS: "int8"})[0]


def fold_awq(params, statistics: Mapping[str, quant.Statistics], format: str, group_size: int | None):
    """The same function with AWQ's scales: matrices times s, and what comes before them over s.

    Before a matrix comes the norm of its mixer or channel layer, or, of a GLU's last matrix, the values that
    its first one gives.

    Returns:
      Params, and the statistics that their matrices now have.
    """
    flat, tree_structure = jax.tree_util.tree_flatten_with_path(params)
    tree: Any = tree_structure
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    arrays = dict(zip(paths, (x for _, x in flat), strict=True))
    statistics = dict(statistics)
    for sources, matrices in _folds(paths, statistics):
        s = quant.awq_scale(
            tuple(arrays[m] for m in matrices), statistics[matrices[0]], format, group_size=group_size
        )
        for m in matrices:
            arrays[m] = quant.multiply_inputs(arrays[m], s)
            statistics[m] = statistics[m].divided(s)
        for source in sources:
            arrays[source] = quant.divide_outputs(arrays[source], s)
    return tree.unflatten([arrays[path] for path in paths]), statistics


def _folds(paths: list[str], statistics: Mapping[str, quant.Statistics]):
    """(arrays before, matrices that share their output) of every fold, from the input of a layer up."""
    for block in sorted({m.group() for p in paths if (m := re.match(r".*?block_\d+", p))}):
        for part in ("mixer", "channel"):
            norm = [p for p in paths if p.startswith(f"{block}/{part}_norm/")]
            inside = [p for p in statistics if p.startswith(f"{block}/{part}/")]
            if norm and inside:
                first = np.asarray(statistics[inside[0]].total)
                yield norm, [m for m in inside if np.array_equal(statistics[m].total, first)]
        gate, out = (f"{block}/channel/{name}/kernel" for name in ("gate_in", "out"))
        if gate in statistics and out in statistics:
            yield [gate], [out]


def _rule(format: str, group_size: int | None):
    return format if group_size is None else (format, group_size)


def texts(config, tokenizer, max_bytes: int):
    """The corpus that a run's config names, and batches of at most `max_bytes` (0: all) that it held out."""
    corpus = find_corpus(config.data.path or None, heldout=config.data.held_out)
    held_out = heldout_batches(
        corpus,
        tokenizer,
        batch_size=config.evaluation.batch_size,
        sequence_length=config.evaluation.sequence_length,
        limit_bytes=max_bytes or None,
    )
    return corpus, held_out


def measure(module, params, held_out) -> float:
    """Bits per byte of held-out batches."""
    bits = bits_per_byte(module, params, held_out)
    assert bits is not None  # nothing stops it
    return bits


def mean_output_error(params, packed, statistics) -> float:
    """The mean relative error of the outputs of the matrices that have statistics."""
    errors = []
    for path, s in statistics.items():
        w, q = params, packed
        for name in path.split("/"):
            w, q = w[name], q[name]
        errors.append(np.mean(quant.output_error(w, q, s)))
    return float(np.mean(errors))


def decoding_speed(module, models: Mapping[str, Any], tokens: int, repeats: int) -> dict[str, float]:
    """Tokens a second of one sequence, decoded one by one, for each of several params; by turns."""

    # A loop inside the program would decode the weights once for all tokens, and hold them whole.
    @partial(jax.jit, donate_argnums=1)
    def step(params, state, token):
        logits, state = module.apply({"params": params}, token, state=state)
        return logits[:, -1:].argmax(-1).astype(token.dtype), state

    def decode(params, state, token):
        state = jax.tree.map(jnp.copy, state)
        for _ in range(tokens):
            token, state = step(params, state, token)
        return token

    calls: dict[str, Callable[[], Any]] = {}
    for name, params in models.items():
        _, state = module.apply({"params": params}, jnp.zeros((1, 1), jnp.int32))
        calls[name] = partial(decode, params, state, jnp.ones((1, 1), jnp.int32))
        jax.block_until_ready(calls[name]())
    return {name: round(1e3 * tokens / min(ms), 1) for name, ms in milliseconds(calls, repeats).items()}


def plot(path: Path, rows: list[Row]) -> None:
    """Bits per byte over bytes: a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for method in dict.fromkeys(row.method for row in rows):
        mine = sorted((r for r in rows if r.method == method), key=lambda r: r.bytes)
        axes.plot([r.bytes for r in mine], [r.held_out_bits_per_byte for r in mine], "o", label=method)
        if method in ("nearest", "none", "trained"):
            for r in mine:
                at = (r.bytes, r.held_out_bits_per_byte)
                axes.annotate(r.format, at, textcoords="offset points", xytext=(4, 4), fontsize=8)
    best = min(row.held_out_bits_per_byte for row in rows)
    axes.set(xlabel="bytes of params", ylabel="held-out bits per byte", ylim=(best - 0.02, best * 1.3))
    axes.set_title("The same weights in fewer bits (what is far worse lies above the picture)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(args, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The whole table, ready for JSON."""
    config, module, variables, tokenizer_path, step = load_run(args.run)
    tokenizer = load_tokenizer(tokenizer_path)
    corpus, held_out = texts(config, tokenizer, args.max_bytes)
    loader = make_loader(corpus, tokenizer, batch_size=8, sequence_length=config.data.sequence_length, seed=1)
    batches = [jnp.asarray(next(loader)["tokens"]) for _ in range(args.batches)]
    params = variables["params"]
    statistics = quant.calibrate(module, variables, batches)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params)

    sizes = {f: FORMATS[f] or formats.format_named(f).group_size or "column" for f in args.formats}
    size = sum(x.size for x in jax.tree.leaves(params))
    rows = [Row("bfloat16", "none", measure(module, narrow, held_out), 2 * size)]
    say(f"{rows[0].held_out_bits_per_byte:.4f} bits per byte, bfloat16 weights")
    stored: dict[str, Any] = {"float32": params}
    with tqdm(total=len(args.formats) * len(args.methods), disable=None, unit="model") as progress:
        for format in args.formats:
            for method in args.methods:
                if method == "gptq_sequential":
                    packed = gptq_sequential(module, batches, params, format, FORMATS[format])
                else:
                    pack = {"nearest": nearest, "gptq": gptq, "awq": awq}[method]
                    packed = pack(params, statistics, format, FORMATS[format])
                error = None  # of inputs or weights that are no longer those of the statistics
                if method in ("nearest", "gptq"):
                    error = round(mean_output_error(params, packed, statistics), 5)
                bits = measure(module, packed, held_out)
                nbytes = sum(x.nbytes for x in jax.tree.leaves(packed))
                rows.append(Row(format, method, round(bits, 4), nbytes, error))
                if method == "nearest":
                    stored[format] = packed
                progress.write(f"  {format:9} {method:15} {bits:8.4f} bits per byte  {nbytes:>10,} bytes")
                progress.update()
    if args.ternary:
        rows.append(ternary_row(args.ternary, args.max_bytes))
        say(f"  ternary, trained: {rows[-1].held_out_bits_per_byte:.4f} bits, {rows[-1].bytes:,} bytes")
    start = time.monotonic()
    speed = decoding_speed(module, stored, args.decode, repeats=5) if args.decode else {}
    say(f"decoding speed took {time.monotonic() - start:.0f} s")
    plot(args.plot, rows)
    say(f"drawn: {args.plot}")
    return {
        "model": {"config": Path(args.run).name, "step": step, "parameters": size},
        "calibration_tokens": int(sum(b.size for b in batches)),
        "held_out_bytes": int(sum(np.sum(b["weights"]) for b in held_out)),
        "group_sizes": sizes,
        "rows": [row._asdict() for row in rows],
        "decoded_tokens_per_second": speed,
    }


def added(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """The result with the rows of an earlier one of the same model and text that it lacks."""
    if not path.exists():
        return result
    earlier = json.loads(path.read_text())
    for name in ("model", "calibration_tokens", "held_out_bytes"):
        if earlier[name] != result[name]:
            raise ValueError(f"{path}: got rows of {name} {earlier[name]}; expected {result[name]}")
    rows = {(row["format"], row["method"]): row for row in earlier["rows"] + result["rows"]}
    maps = {name: earlier[name] | result[name] for name in ("group_sizes", "decoded_tokens_per_second")}
    return result | maps | {"rows": list(rows.values())}


def ternary_row(run_dir: str, max_bytes: int) -> Row:
    """A model that was trained in ternary, packed: its `BitLinear`s hold two bits a weight."""
    config, module, variables, tokenizer_path, _ = load_run(run_dir)
    _, held_out = texts(config, load_tokenizer(tokenizer_path), max_bytes)
    packed = quant.quantize_params(variables["params"], {"kernel$": "ternary", ROWS: "int8"})[0]
    bits = measure(module, packed, held_out)
    return Row("ternary", "trained", round(bits, 4), sum(x.nbytes for x in jax.tree.leaves(packed)))


def main(arguments=None) -> None:
    """Read the command line, run, print and write."""
    parser = argparse.ArgumentParser(
        prog="experiments.studies.low_bit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", default="runs/quickstart", help="the run's folder (default: %(default)s)")
    parser.add_argument("--ternary", help="the folder of a run that was trained in ternary")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batches", type=int, default=32, help="of 8 rows of training text, for statistics")
    parser.add_argument("--max_bytes", type=int, default=0, help="of held-out text; 0: all")
    parser.add_argument("--decode", type=int, default=256, help="tokens decoded for the speed; 0: no speed")
    parser.add_argument("--out", type=Path, help="the JSON to write, or to add rows to; default: none")
    parser.add_argument("--plot", type=Path, default=Path("runs/low_bit.png"), help="the figure")
    args = parser.parse_args(arguments)
    try:
        result = about() | run(args)
        if args.out:
            result = added(result, args.out)
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"experiments.studies.low_bit: {error}")
    if args.out:
        save(args.out, result)
    else:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
