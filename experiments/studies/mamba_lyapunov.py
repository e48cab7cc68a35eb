"""Is a trained Mamba's recurrence stable, and does bfloat16 disturb it less than a Transformer of equal size?

  python -m experiments.studies.mamba_lyapunov                about ten minutes on one core
  python -m experiments.studies.mamba_lyapunov --smoke        every part, in two minutes

Trains a byte-level Mamba and a Transformer on the standard library's sources, then

1. estimates the maximal Lyapunov exponent of each Mamba block on held-out text by Jacobian-vector products
   through the layer's own decoding step, beside the closed form of its diagonal recurrence,
2. keeps the states of a block in bfloat16 and in float32, and those of a control whose rates are positive,
3. runs both models in bfloat16 and in float32 with the same weights,
4. fine-tunes both on other text (NumPy's sources) in full and by LoRA on their fused input projections, each
   in bfloat16 and in float32, and compares every way with full fine-tuning in float32.

Mixed precision means activations and matrix products in bfloat16, params and optimizer in float32; the scan
keeps its states in float32 in either. The text is the machine's own, so figures differ a little by machine.

Source: Halloran, Gulati and Roysdon 2024 (arXiv 2406.00209). There the models are pretrained ones of 130M
parameters and more, and what is compared is accuracy on benchmarks of language.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

import frugax
from experiments.benchmarks.interleaved import about, save
from experiments.configs.defaults import defaults
from experiments.data import find_corpus, heldout_batches, load_tokenizer, make_loader
from experiments.studies.lyapunov import log_growth, precision_gap
from experiments.studies.tuning import compare_tuning, deviation, figures, logits_of
from experiments.trainer.optimizers import make_optimizer
from experiments.trainer.state import bits_per_byte, init_state, make_train_step
from frugax.layers.block import BlockLayer

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "mamba_lyapunov.json"

# The matrices that read a block's input: of Mamba those of u and z, and the one that dt, B and C share.
FUSED = {"mamba": ("in_gate", "dt_B_C"), "transformer": ("qkv", "gate_in")}
CONTROL_GROWTH = 0.01  # a token, of the unstable control


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of models, batches and measurements."""

    width: int = 128
    mamba_layers: int = 4  # half as many of the Transformer, whose layers have a channel mixer too
    state_size: int = 16
    heads: int = 4
    batch: int = 4
    length: int = 256  # tokens of a training row, and of the attention's window
    steps: int = 400
    tune_steps: int = 60
    rank: int = 8
    rows: int = 4  # of held-out text, for deviations
    context: int = 1024  # tokens of such a row
    exponent_rows: int = 2
    exponent_tokens: int = 8192  # the first half is to turn the disturbance
    held_out_bytes: int = 65536


SMOKE = Sizes(
    **dict(width=16, mamba_layers=2, state_size=4, heads=2, batch=2, length=32, steps=4),
    **dict(tune_steps=3, rank=2, rows=2, context=64, exponent_tokens=128, held_out_bytes=2048),
)


class Recurrence(NamedTuple):
    """Inputs of a Mamba layer's scan, h = exp(dt A) h + dt B u."""

    dt: Array  # [R, T, E], positive
    u: Array  # [R, T, E]
    B: Array  # [R, T, N]
    A: Array  # [E, N], negative


def models(sizes: Sizes) -> dict[str, frugax.layers.Decoder]:
    """The two decoders; the Transformer's hidden width is what makes their parameters most nearly equal."""
    mamba = frugax.layers.Block("Mamba", None, {"state_size": sizes.state_size})
    common = dict(vocab_size=load_tokenizer(None).vocab_size, width=sizes.width, unroll=True, backend="xla")
    found = {"mamba": frugax.layers.Decoder(blocks=(mamba,), repeats=sizes.mamba_layers, **common)}
    target = parameters(found["mamba"])

    def transformer(hidden: int):
        attention = {"heads": sizes.heads, "window": sizes.length}
        block = frugax.layers.Block(
            "SlidingWindowAttention", "GLU", attention, {"expand": hidden / sizes.width}
        )
        return frugax.layers.Decoder(blocks=(block,), repeats=sizes.mamba_layers // 2, **common)

    least, eight_more = parameters(transformer(8)), parameters(transformer(16))
    hidden = 8 + 8 * max(round((target - least) / (eight_more - least)), 0)
    return found | {"transformer": transformer(hidden)}


def parameters(module) -> int:
    """Count a module's parameters."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return sum(x.size for x in jax.tree.leaves(shapes))


def pretrain(module, batches, sizes: Sizes, seed: int, say: Callable[[str], None]):
    """Params after `sizes.steps` steps of Muon."""
    config = defaults().optimizer
    config.name, config.learning_rate = "muon", 0.012  # of matrices
    config.options = ConfigDict({"adam_learning_rate": 0.004, "ns_steps": 4})
    config.warmup_steps = min(15, sizes.steps // 4)
    optimizer = make_optimizer(config, sizes.steps)
    state = jax.jit(lambda: init_state(module, optimizer, seed, 0.0))()
    step = jax.jit(make_train_step(module, optimizer, accumulate=1, ema_decay=0.0), donate_argnums=0)
    start = time.monotonic()
    for number in range(1, sizes.steps + 1):
        state, metrics = step(state, dict(next(batches)))
        if number % max(sizes.steps // 10, 1) == 0:
            bits, seconds = float(metrics["bits_per_byte"]), time.monotonic() - start
            say(f"  step {number}: {bits:.3f} bits per byte, {seconds:.0f} s")
    return state.params


def mamba_layers(module, params, tokens_RT):
    """Yields each layer's mixer params, mixer inputs [R, T, D] and `Recurrence`, from the input up."""
    (block,) = module.blocks
    mixer = mixer_of(module)
    layer = BlockLayer(block, module.repeats, module.dtype, module.param_dtype, module.backend)
    x = jnp.take(params["embedding"], tokens_RT, axis=0)

    @jax.jit
    def read(p, x):
        normed = block.norm_class(**dict(block.norm_args)).apply({"params": p["mixer_norm"]}, x)
        watched = {"dt", "dt_B_C", "conv"}
        _, seen = mixer.apply(
            {"params": p["mixer"]},
            normed,
            capture_intermediates=lambda m, _: m.name in watched,
            mutable="intermediates",
        )
        out = {name: seen["intermediates"][name]["__call__"][0] for name in watched}
        N = mixer.state_size
        dt = jax.nn.softplus(out["dt"] + p["mixer"]["dt_bias"][None, None])
        B = out["dt_B_C"][..., -2 * N : -N]
        A = -jnp.exp(p["mixer"]["A_log"])
        return (
            normed,
            Recurrence(dt, out["conv"][0], B, A),
            layer.apply({"params": p}, x, None, ({}, {}), {}, None)[0],
        )

    for i in range(module.repeats):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]["block_0"])
        normed, recurrence, x = read(p, x)
        yield p["mixer"], normed, recurrence


def mixer_of(module) -> frugax.layers.Mamba:
    """The Mamba layer of a decoder that has no other; with derivatives by `jax.jvp`."""
    return frugax.layers.Mamba(**dict(module.blocks[0].mixer_args), backend="xla")


def exponents(module, params, tokens_RT, key, burn_in: int) -> list[dict[str, Any]]:
    """For each Mamba layer the maximal Lyapunov exponent of each row of text, estimated and in closed form.

    The estimate knows only the layer's decoding step and its state. The closed form is the mean over tokens
    of dt A of the coordinate that contracts least: the recurrence is diagonal.

    Returns:
      For each layer: estimates [R] and closed_form [R] (nats a token, after `burn_in` tokens), and growth
      [R, T] of each token.
    """
    mixer = mixer_of(module)

    @jax.jit
    def growth(p, x_RTD):
        def step(state, x_D):
            return mixer.apply({"params": p}, x_D[None, None], state=state)[1]

        def row(x_TD, key):
            shapes = jax.eval_shape(lambda: mixer.apply({"params": p}, x_TD[None, :1])[1])
            return log_growth(step, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), x_TD, key)

        return jax.vmap(row)(x_RTD, jax.random.split(key, len(x_RTD)))

    rows = []
    for p, normed, recurrence in mamba_layers(module, params, tokens_RT):
        growth_RT = np.asarray(growth(p, normed), np.float64)
        mean_dt_RE = np.asarray(recurrence.dt, np.float64)[:, burn_in:].mean(1)
        rows.append(
            {
                "estimates": growth_RT[:, burn_in:].mean(1),
                "closed_form": (mean_dt_RE[..., None] * np.asarray(recurrence.A, np.float64)).max((1, 2)),
                "growth": growth_RT,
            }
        )
    return rows


def memory_gaps(recurrence: Recurrence) -> dict[str, np.ndarray]:
    """Distances [T] of states kept in bfloat16 from float32's: a layer's on one row, and a control's.

    Both read the first row's dt, B and u. The control's rates are the layer's with the other sign, scaled so
    that the fastest coordinate grows by CONTROL_GROWTH a token: it is unstable.
    """
    dt, u, B, A = recurrence
    tokens = (dt[0], u[0], B[0])
    fastest = jnp.max(jnp.mean(dt[0], 0)[:, None] * -A)

    def step(A, h_EN, token):
        dt_E, u_E, B_N = token
        return jnp.exp(dt_E[:, None] * A) * h_EN + (dt_E * u_E)[:, None] * B_N

    def gap(A):
        return np.asarray(precision_gap(partial(step, A), jnp.zeros(A.shape), tokens, jnp.bfloat16))

    return {"trained": gap(A), "control": gap(-A * CONTROL_GROWTH / fastest)}


def summarize(layers) -> list[dict[str, float]]:
    """Means over rows of text of what `exponents` returns, and the largest of any row."""
    return [
        {
            "estimate": figures(layer["estimates"].mean()),
            "closed_form": figures(layer["closed_form"].mean()),
            "largest_estimate": figures(layer["estimates"].max()),
            "largest_difference": figures(np.abs(layer["estimates"] - layer["closed_form"]).max()),
        }
        for layer in layers
    ]


def plot(path: Path, layers, burn_in: int, gaps, deviations, tuning) -> None:
    """Four panels: exponents over tokens, gaps of states, deviations of logits, ends of fine-tuning."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((a, b), (c, d)) = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for i, layer in enumerate(layers):
        after = layer["growth"][:, burn_in:].mean(0)
        running = np.cumsum(after) / np.arange(1, len(after) + 1)
        a.plot(burn_in + np.arange(len(after)), running, color=f"C{i}", label=f"block {i}")
        a.axhline(layer["closed_form"].mean(), color=f"C{i}", linestyle=":", linewidth=1)
    a.axhline(0, color="black", linewidth=0.8)
    a.set(title="Maximal Lyapunov exponent (dotted: closed form)", xlabel="tokens", ylabel="nats a token")
    for name, gap in gaps.items():
        b.semilogy(np.maximum(gap, 1e-9), label=name)
    b.set(title="States kept in bfloat16 against float32, last block", xlabel="tokens", ylabel="distance")
    for name, curve in deviations.items():
        width = max(len(curve) // 64, 1)
        smooth = np.convolve(curve, np.ones(width) / width, "valid")
        c.plot(smooth, label=name)
    c.set(title="Logits in bfloat16 against float32, same weights", xlabel="position", ylabel="relative")
    c.set_ylim(bottom=0)
    names = [name for name in next(iter(tuning.values())) if name != "full float32"]
    for i, (model, rows) in enumerate(tuning.items()):
        heights = [rows[name]["from full float32"]["logits"] for name in names]
        d.bar(np.arange(len(names)) + 0.4 * i, heights, 0.4, label=model)
    d.set_xticks(np.arange(len(names)) + 0.2, names)
    d.set(title="Logits after fine-tuning, from full float32", ylabel="relative")
    for axes in (a, b, c, d):
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(sizes: Sizes, *, data, tune_data, seed: int, plot_path: Path, say=print) -> dict[str, Any]:
    """The whole experiment; what it measured, ready for JSON."""
    tokenizer = load_tokenizer(None)
    corpus, other = find_corpus(data), find_corpus(tune_data)
    row = dict(batch_size=sizes.batch, sequence_length=sizes.length, seed=seed)
    context = dict(batch_size=sizes.rows, sequence_length=sizes.context)
    tune_loader = make_loader(other, tokenizer, **row)
    batches = [dict(next(tune_loader)) for _ in range(sizes.tune_steps)]
    # Rows are read as one text: where a new document starts, a state would be forgotten for another reason.
    tokens_RT = jnp.asarray(heldout_batches(corpus, tokenizer, **context)[0]["tokens"])
    long = dict(batch_size=sizes.exponent_rows, sequence_length=sizes.exponent_tokens)
    long_RT = jnp.asarray(heldout_batches(corpus, tokenizer, **long)[0]["tokens"])
    held_out = heldout_batches(other, tokenizer, **context, limit_bytes=sizes.held_out_bytes)
    burn_in = sizes.exponent_tokens // 2
    rates = {"full": 1e-3, "lora": 5e-3}

    result: dict[str, Any] = {"sizes": dataclasses.asdict(sizes), "learning_rates": rates, "seed": seed}
    result |= {
        "parameters": {},
        "bits_per_byte_before_tuning": {},
        "bfloat16_logits": {},
        "tuning": {},
    }
    deviations = {}
    for name, module in models(sizes).items():
        result["parameters"][name] = parameters(module)
        say(f"{name}: {parameters(module):,} parameters")
        params = pretrain(module, make_loader(corpus, tokenizer, **row), sizes, seed, say)
        low = logits_of(module.clone(dtype=jnp.bfloat16), params, tokens_RT)
        deviations[name] = deviation(low, logits_of(module, params, tokens_RT))
        quarter = sizes.context // 4
        result["bfloat16_logits"][name] = {
            "mean": figures(deviations[name].mean()),
            "quarters": [figures(deviations[name][i * quarter :][:quarter].mean()) for i in range(4)],
        }
        result["bits_per_byte_before_tuning"][name] = round(bits_per_byte(module, params, held_out), 4)
        result["tuning"][name], tuned = compare_tuning(
            module, params, FUSED[name], batches, held_out, tokens_RT, sizes.rank, rates, say
        )
        if name == "mamba":
            key = jax.random.key(seed)
            layers = exponents(module, params, long_RT, key, burn_in)
            after = exponents(module, tuned, long_RT, key, burn_in)
            *_, (_, _, recurrence) = mamba_layers(module, params, long_RT)
            gaps = memory_gaps(recurrence)
            result["exponents"] = summarize(layers)
            result["exponents_after_lora_in_bfloat16"] = summarize(after)
            result["bfloat16_states"] = {
                which: {"at_a_quarter": figures(gap[len(gap) // 4]), "at_the_end": figures(gap[-1])}
                for which, gap in gaps.items()
            }
            for i, layer in enumerate(result["exponents"]):
                say(f"  block {i}: exponent {layer['estimate']}, closed form {layer['closed_form']}")
    plot(plot_path, layers, burn_in, gaps, deviations, result["tuning"])
    say(f"drawn: {plot_path}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="the smallest models, a few steps")
    parser.add_argument("--data", help="folder, glob or file to train on; default: the standard library")
    parser.add_argument("--tune-data", default=Path(np.__file__).parent, help="default: NumPy's sources")
    parser.add_argument("--steps", type=int, help="of training; default: %(default)s", default=Sizes.steps)
    parser.add_argument("--seed", type=int, default=0, help="of params and of the order of the data")
    parser.add_argument("--out", type=Path, help="JSON to write; default: the committed one (--smoke: none)")
    parser.add_argument("--plot", type=Path, default=Path("runs/mamba_lyapunov.png"), help="the picture")
    args = parser.parse_args()
    sizes = SMOKE if args.smoke else dataclasses.replace(Sizes(), steps=args.steps)
    result = about() | run(
        sizes,
        data=args.data,
        tune_data=args.tune_data,
        seed=args.seed,
        plot_path=args.plot,
        say=lambda line: print(line, flush=True),
    )
    out = args.out or (None if args.smoke else RESULTS)
    if out is None:
        print(json.dumps(result, indent=2))
    else:
        save(out, result)


if __name__ == "__main__":
    main()
