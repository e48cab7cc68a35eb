"""CPU seconds of tracing the value and gradient of two experiments' losses: this frugax, and an earlier one.

python -m experiments.benchmarks.trace_models_cpu [--before DIR]

DIR is a folder in which `frugax` leads to an earlier checkout's lib/. Every contender is measured in
processes of its own, which take turns, with backend=None and with "xla". Nothing is timed before the gradient
of a small batch is finite, and the same in all of them.
"""

import argparse
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import frugax
from experiments.benchmarks.earlier import commit, in_a_process
from experiments.benchmarks.interleaved import about, cpu_seconds, save
from experiments.configs.lm import mamba_bytes, quickstart
from experiments.trainer.runs import build_model

RESULTS = Path(__file__).parent / "results" / "trace_models_cpu.json"
CONFIGS = {"quickstart": quickstart.get_config, "mamba_bytes": mamba_bytes.get_config}
BACKENDS = ("default", "xla")
SAME = 1e-4  # relative, between the gradients' norms


def loss_of(name: str, backend: str):
    """The loss of parameters and a batch, a function that makes the parameters, and the batch's shape."""
    config = CONFIGS[name]()
    config.model.vocab_size, config.model.backend = 256, "" if backend == "default" else backend
    module = build_model(config)

    def loss(params, tokens, segment_ids):
        logits, _ = module.apply({"params": params}, tokens, segment_ids=segment_ids)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens)
        return jnp.mean(losses)

    def params():
        return module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

    return loss, params, (config.batch_size, config.data.sequence_length)


def measure(name: str, backend: str) -> dict[str, float]:
    """CPU seconds of the first trace in a process, the parameters' types being known."""
    loss, params, shape = loss_of(name, backend)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    types = jax.eval_shape(params)
    return {"trace_s": cpu_seconds(lambda: jax.jit(jax.value_and_grad(loss)).trace(types, ids, ids))}


def check(name: str, backend: str) -> dict[str, float]:
    """The norm of a small batch's gradient.

    Raises:
      AssertionError: it is not finite.
    """
    loss, params, _ = loss_of(name, backend)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 70)), jnp.int32)
    gradient = jax.jit(jax.grad(loss))(params(), tokens, jnp.zeros_like(tokens).at[:, 40:].set(1))
    norm = float(optax.tree.norm(gradient))
    if not (math.isfinite(norm) and norm > 0):
        raise AssertionError(f"{name}: the gradient's norm is {norm}")
    return {"norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, metavar="DIR", help="a folder with an earlier frugax")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each contender")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job, name, backend = args.job
        found = {"measure": measure, "check": check}[job](name, backend)
        print(json.dumps(found | {"frugax": frugax.__file__}))
        return
    result = about() | ({"before": commit(args.before)} if args.before else {})
    places = {"now": None} | ({"before": args.before} if args.before else {})
    contenders = [(name, backend, place) for name in CONFIGS for backend in BACKENDS for place in places]
    here = "experiments.benchmarks.trace_models_cpu"
    norms: dict[str, float] = {}
    for name, backend, place in contenders:
        norm = in_a_process(here, "check", name, backend, before=places[place])["norm"]
        if abs(norm - norms.setdefault(name, norm)) > SAME * norm:
            raise AssertionError(
                f"{name}, {backend}, {place}: the gradient's norm is {norm}, not {norms[name]}"
            )
    runs: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        for name, backend, place in contenders:
            found = in_a_process(here, "measure", name, backend, before=places[place])
            runs.setdefault(f"{name}, {backend}, {place}", []).append(found["trace_s"])
    result["cpu_seconds"] = {label: round(float(np.median(times)), 3) for label, times in runs.items()}
    save(args.out, result)


if __name__ == "__main__":
    main()
