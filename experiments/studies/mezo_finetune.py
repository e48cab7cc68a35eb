"""Fine-tune a trained language model into a classifier by forward passes alone, beside Adam.

  python -m experiments.train --config=experiments/configs/lm/quickstart.py --config.model.width=64
      --config.model.repeats=2 --run=runs/mezo_base                        two minutes on a core, in one line
  python -m experiments.studies.mezo_finetune --run=runs/mezo_base                 eight more
  python -m experiments.studies.mezo_finetune --smoke                         an untrained model, in seconds

The task: which package of the standard library 64 bytes of Python come from, one of four. Every fourth file
of a package is held out. The classifier is the language model, the mean over positions of its scores of the
next byte, and a linear head that starts at zero: the first loss is ln 4. All parameters are trained, at a
constant learning rate, each method's the best of three, a factor 3 apart, in runs of a quarter of the steps.

The methods are MeZO (arXiv 2305.17333), Sparse MeZO (2402.15751), those of the zeroth-order benchmark
(2402.11592), and Adam with gradients. A zeroth-order step costs two forward passes (conservative: five;
forward gradient: one, of twice the cost).
"""

import argparse
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import frugax
from experiments.benchmarks.interleaved import about
from experiments.trainer.runs import load_run
from frugax.optim import zeroth_order as zo

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "mezo_finetune.json"
PACKAGES = ("asyncio", "email", "encodings", "multiprocessing")
LENGTH, BATCH, HELD_OUT = 64, 16, 1024
EPSILON = 1e-3


class Method(NamedTuple):
    """A way to train."""

    rate: float
    init: Callable[[Any], Any]  # params -> state
    step: Callable[..., tuple[Any, Any]]  # (loss, params, state, key) -> (params, state)


def in_place(step: Callable[..., Any], rate: float, **options) -> Method:
    """A method that moves the params itself."""

    def run(loss, params, state, key):
        return step(loss, params, key, learning_rate=rate, **options, **state)[0], state

    return Method(rate, lambda params: {}, run)


def sparse(rate: float, density: float) -> Method:
    """Sparse MeZO: its thresholds are found once. All of the head moves: it starts at zero."""

    def init(params):
        thresholds = zo.magnitude_thresholds(params, density)
        return {"thresholds": thresholds | {"head": jnp.array(jnp.inf)}}

    return in_place(zo.sparse_mezo_step, rate, epsilon=EPSILON)._replace(init=init)


def by_optax(optimizer: Callable[..., optax.GradientTransformation], rate: float, estimator=None) -> Method:
    """Any optimizer on estimates of the gradient; None: on the gradient."""
    tx = optimizer(rate)

    def run(loss, params, state, key):
        if estimator is None:
            gradient = jax.grad(loss)(params)
        else:
            gradient, _ = zo.zo_gradient(loss, params, key, estimator=estimator)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return Method(rate, tx.init, run)


AWAY = zo.two_point(EPSILON, in_place=False)
METHODS: dict[str, tuple[float, Callable[[float], Method]]] = {  # the learning rate, and what takes it
    "MeZO": (1e-4, lambda rate: in_place(frugax.optim.mezo_step, rate, epsilon=EPSILON)),
    "Sparse MeZO": (1e-4, lambda rate: sparse(rate, density=0.25)),
    "ZO-SGD": (1e-4, lambda rate: by_optax(optax.sgd, rate, AWAY)),
    "ZO-SGD-sign": (1e-4, lambda rate: by_optax(optax.sign_sgd, rate, AWAY)),
    "ZO-SGD-momentum": (1e-5, lambda rate: by_optax(lambda r: optax.sgd(r, momentum=0.9), rate, AWAY)),
    "ZO-Adam": (1e-4, lambda rate: by_optax(optax.adam, rate, AWAY)),
    "ZO-SGD-conservative": (1e-4, lambda rate: in_place(zo.conservative_step, rate, estimator=AWAY)),
    "forward gradient": (1e-4, lambda rate: in_place(zo.zo_step, rate, estimator=zo.forward_gradient())),
    "Adam, first order": (1e-3, lambda rate: by_optax(optax.adam, rate)),
}


class Snippets(NamedTuple):
    """Bytes and the package that they come from."""

    tokens: Any  # [N, LENGTH]
    labels: Any  # [N]


def files(package: str, held_out: bool) -> list[Path]:
    """The sources of a package: every fourth one if held out, else the others."""
    every = sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py"))
    every = [path for path in every if path.stat().st_size > LENGTH]
    return [path for i, path in enumerate(every) if (i % 4 == 3) == held_out]


def snippets(count: int, held_out: bool, seed: int) -> Snippets:
    """`count` snippets at random places of random files, as many of each package."""
    rng = np.random.default_rng(seed)
    tokens, labels = np.zeros((count, LENGTH), np.int32), np.arange(count) % len(PACKAGES)
    texts = [[path.read_bytes() for path in files(package, held_out)] for package in PACKAGES]
    for i, label in enumerate(labels):
        data = texts[label][rng.integers(len(texts[label]))]
        start = rng.integers(len(data) - LENGTH)
        tokens[i] = np.frombuffer(data[start : start + LENGTH], np.uint8)
    return Snippets(tokens, labels.astype(np.int32))


def classifier(module: Any, params: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """The parameters of the classifier, and its function (params, tokens [B, T]) -> scores [B, classes]."""

    def scores(params, tokens):
        logits_BTV, _ = module.apply({"params": params["model"]}, tokens)
        return jnp.mean(logits_BTV, axis=1) @ params["head"]

    return {"model": params, "head": jnp.zeros((module.vocab_size, len(PACKAGES)))}, scores


def mean_loss(scores: Callable[[Any, Any], Any], params: Any, batch: Snippets) -> Any:
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(scores(params, batch.tokens), batch.labels)
    )


def evaluate(scores: Callable[[Any, Any], Any], params: Any, data: Snippets) -> tuple[float, float]:
    """Loss and accuracy."""
    found = jax.jit(scores)(params, data.tokens)
    losses = optax.softmax_cross_entropy_with_integer_labels(found, data.labels)
    return float(jnp.mean(losses)), float(jnp.mean(jnp.argmax(found, axis=-1) == data.labels))


def run(method: Method, module: Any, params: Any, steps: int, train: Snippets, test: Snippets) -> dict:
    """Train for `steps`; what the held-out loss and accuracy were before and after, and what a step takes."""
    params, scores = classifier(module, params)
    params = jax.tree.map(jnp.copy, params)  # steps take their place
    state = method.init(params)

    def step(params, state, key, batch):
        return method.step(lambda p: mean_loss(scores, p, batch), params, state, key)

    def batch(i):
        rows = np.random.default_rng([1, i]).integers(len(train.labels), size=BATCH)
        return Snippets(train.tokens[rows], train.labels[rows])

    def temporaries(compiled):
        return compiled.memory_analysis().temp_size_in_bytes

    inference = jax.jit(lambda p, b: mean_loss(scores, p, b)).lower(params, batch(0)).compile()
    compiled = (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, jax.random.key(0), batch(0)).compile()
    )
    loss_before, accuracy_before = evaluate(scores, params, test)
    state_bytes = frugax.optim.state_bytes(state)
    for i in range(steps):
        params, state = compiled(params, state, jax.random.fold_in(jax.random.key(0), i), batch(i))
    loss, accuracy = evaluate(scores, params, test)
    return {
        "rate": method.rate,
        "steps": steps,
        "loss_before": round(loss_before, 4),
        "accuracy_before": round(accuracy_before, 4),
        "loss": round(loss, 4),
        "accuracy": round(accuracy, 4),
        "state_bytes": state_bytes,
        "step_temporaries": temporaries(compiled),
        "inference_temporaries": temporaries(inference),
    }


def table(rows: dict[str, dict]) -> str:
    """Each method's result."""
    lines = ["method               rate     steps  loss    accuracy  state MB  step's MB  inference's MB"]
    for name, r in rows.items():
        megabytes = [r[k] / 1e6 for k in ("state_bytes", "step_temporaries", "inference_temporaries")]
        lines.append(
            f"{name:20} {r['rate']:7.0e}  {r['steps']:5}  {r['loss']:.3f}  {r['accuracy']:8.3f}  "
            f"{megabytes[0]:8.2f}  {megabytes[1]:9.2f}  {megabytes[2]:14.2f}"
        )
    return "\n".join(lines)


def untrained() -> frugax.layers.Decoder:
    """A decoder of bytes as small as --smoke needs."""
    block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 2, "conv_width": 4}, {"expand": 2.0})
    return frugax.layers.Decoder(256, 48, (block,), tie_embeddings=False, unroll=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", help="what experiments.train --run was given")
    parser.add_argument("--smoke", action="store_true", help="a few steps; without --run, of a new model")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--steps", type=int, default=2000, help="of the zeroth-order methods; a tenth of Adam"
    )
    parser.add_argument("--rate", type=float, help="instead of each method's own")
    parser.add_argument(
        "--out", type=Path, help=f"the JSON to write; default: {RESULTS.name}, none if --smoke"
    )
    args = parser.parse_args(argv)
    if args.run:
        _, module, variables, tokenizer, step = load_run(args.run)
        if tokenizer:
            parser.error(f"--run: {args.run} has a tokenizer; expected a model of bytes")
        params = variables["params"]
    elif args.smoke:
        step, module = 0, untrained()
        params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    else:
        parser.error("--run: got none; expected a run of experiments.train")
    train, test = snippets(20_000, False, 0), snippets(HELD_OUT, True, 1)
    module = module.clone(backend="xla")  # the forward gradient needs forward-mode differentiation
    out = args.out or (None if args.smoke else RESULTS)
    result = about() | {
        "model": f"{module.width} wide, {module.repeats} layers, {step} steps of training",
        "parameters": int(optax.tree.size(params)),
        "task": f"which of {', '.join(PACKAGES)} {LENGTH} bytes come from; {HELD_OUT} held out",
        "batch": BATCH,
    }
    rows = {}
    for name in args.only:
        rate, make = METHODS[name]
        steps = 3 if args.smoke else args.steps // (10 if "first order" in name else 1)
        rows[name] = run(make(args.rate or rate), module, params, steps, train, test)
        print(name, rows[name], flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result | {"rows": rows}, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
