"""Train classifiers from a config, and print their held-out accuracies side by side.

  python -m experiments.classify --config=experiments/configs/classify/vmamba_digits.py
  python -m experiments.classify --config=experiments/configs/classify/vmamba_digits.py:smoke  # in seconds
  python -m experiments.classify --config=FILE --config.steps=100 --run=DIR

metrics.jsonl, loss.png and results.json go to --run. results.json is written after each model: the same
command again goes on with the models missing from it. A model trains for minutes and keeps no checkpoints.
"""

import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app
from ml_collections import ConfigDict
from tqdm import tqdm

import frugax
from experiments.configs.checks import check_classification
from experiments.data import examples
from experiments.trainer.flags import CONFIG, run, run_dir
from experiments.trainer.kept_memory import keep_memory
from experiments.trainer.lock import locked
from experiments.trainer.metrics import read_lines
from experiments.trainer.optimizers import check_optimizer, make_optimizer


def build(model: ConfigDict, classes: int) -> Any:
    """Build the module that a config's `models.NAME` describes."""
    args = model.args.to_dict()
    if model.kind == "Decoder":
        blocks = tuple(frugax.layers.Block(**block) for block in args.pop("blocks"))
        return frugax.layers.Decoder(vocab_size=classes, blocks=blocks, **args)
    return getattr(frugax.layers, model.kind)(classes=classes, **args)


def logits_of(module, variables, inputs):
    """Scores [..., classes]; what else a stateful model returns is dropped."""
    out = module.apply(variables, inputs)
    return out[0] if isinstance(out, tuple) else out


def train(config: ConfigDict, model: ConfigDict, task: examples.Task, log) -> dict[str, Any]:
    """Train one model; returns its held-out accuracy, size and times. `log(step, loss)` gets every step."""
    module = build(model, task.classes)
    optimizer = make_optimizer(config.optimizer, config.steps)
    variables = jax.jit(module.init)(jax.random.key(config.seed), jnp.asarray(task.train.inputs[:1]))
    check_optimizer(config.optimizer, optimizer, variables["params"])
    state = jax.jit(optimizer.init)(variables["params"])

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            scores = logits_of(module, {"params": params}, batch.inputs).astype(jnp.float32)
            each = optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels)
            return jnp.sum(each * batch.weights) / jnp.sum(batch.weights)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def right(params, batch):
        found = jnp.argmax(logits_of(module, {"params": params}, batch.inputs), axis=-1)
        return jnp.sum((found == batch.labels) * batch.weights)

    def accuracy(test, size=100):
        parts = [
            examples.Examples(*(x[i : i + size] for x in test)) for i in range(0, len(test.inputs), size)
        ]
        return round(sum(float(right(params, part)) for part in parts) / float(test.weights.sum()), 4)

    rng, params, start = np.random.default_rng(config.seed), variables["params"], time.monotonic()
    for number in range(1, config.steps + 1):
        rows = rng.integers(0, len(task.train.inputs), config.batch_size)
        params, state, value = step(params, state, examples.Examples(*(x[rows] for x in task.train)))
        log(number, float(value))
    seconds = time.monotonic() - start
    found = {
        "accuracy": accuracy(task.held_out),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "seconds": round(seconds, 1),
    }
    if task.lengths:
        found["accuracy_by_length"] = {length: accuracy(test) for length, test in task.lengths.items()}
    return found


def baselines(task: examples.Task) -> dict[str, dict[str, float]]:
    """scikit-learn's logistic regression and nearest neighbour on flat inputs; of token tasks, chance."""
    if task.train.inputs.dtype.kind == "i":
        labels = task.held_out.labels[task.held_out.weights > 0]
        return {"chance": {"accuracy": round(1 / len(np.unique(labels)), 4)}}
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    def flat(part):
        labels = part.labels.reshape(len(part.labels), -1)
        weights = part.weights.reshape(labels.shape)
        return part.inputs.reshape(len(labels), -1), (labels * weights).sum(1).astype(int)

    models = {
        "logistic regression": LogisticRegression(max_iter=2000),
        "nearest neighbour": KNeighborsClassifier(1),
    }
    scores = {name: m.fit(*flat(task.train)).score(*flat(task.held_out)) for name, m in models.items()}
    return {name: {"accuracy": round(float(score), 4)} for name, score in scores.items()}


def classify(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Train those of the config's models that `folder` has no result of; returns what results.json holds.

    Raises:
      ValueError: a field of the config can't be right, the folder is another config's, or another process
        trains in it.
      FloatingPointError: a loss is not finite.
    """
    check_classification(config)
    with locked(folder):
        return _classify(config, folder)


def _classify(config: ConfigDict, folder: Path) -> dict[str, Any]:
    results = finished(config, folder)
    task = getattr(examples, config.task)(**config.task_args)
    log_path = folder / "metrics.jsonl"
    lines = [line for line in read_lines(log_path) if line["model"] in results]
    log_path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, model in config.models.items():
        if name in results:
            print(f"{name}: already trained, in {folder}/results.json", flush=True)
            continue
        with open(log_path, "a", encoding="utf-8") as file, _bar(name, config.steps) as bar:

            def log(step, loss, name=name, file=file, bar=bar):
                if not np.isfinite(loss):
                    raise FloatingPointError(f"{name}, step {step}: the loss is {loss}")
                file.write(json.dumps({"model": name, "step": step, "loss": loss}) + "\n")
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                bar.update()
                if bar.disable and step % max(1, config.steps // 10) == 0:  # not a terminal: a few lines
                    print(f"{name}: step {step}/{config.steps}, loss {loss:.4f}", flush=True)

            found = train(config, model, task, log)
        results[name] = found
        save(config, task, results, folder)
    if len(results) == len(config.models):
        results |= baselines(task)
        save(config, task, results, folder)
    for name, found in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()))
    plot(folder)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def finished(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Results that a former run of the same config left in `folder`; ValueError where it was another's."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    old, new = stored["config"], as_json(config)
    fields = [field for field in old | new if old.get(field) != new.get(field)]
    if fields:
        raise ValueError(
            f"{folder} has results of another config: {', '.join(fields)} differ. "
            "Use another --run, or remove that folder."
        )
    return stored["results"]


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as results.json keeps it: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def save(config: ConfigDict, task: examples.Task, results: dict[str, Any], folder: Path) -> None:
    """Write results.json, whole or not at all."""
    summary = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "held_out": int(task.held_out.weights.sum()),
        "results": results,
        "config": as_json(config),
    }
    partial = folder / "results.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "results.json")


def _bar(name: str, steps: int) -> tqdm:
    return tqdm(total=steps, desc=name, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)


def plot(folder: Path) -> None:
    """Draw loss.png, one line a model, from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[float]] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        curves.setdefault(line["model"], []).append(line["loss"])
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, losses in curves.items():
        axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8, label=name)
    axes.set(xlabel="step", ylabel="loss, nats a label", yscale="log")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    """Parse flags, train, and turn what the user can mend into one sentence."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; fields of the config are given as --config.a.b=value")
    if CONFIG.value is None:
        raise app.UsageError("--config: none given; expected --config=experiments/configs/classify/NAME.py")
    try:
        classify(CONFIG.value, Path(run_dir()))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"experiments.classify: {error}")


if __name__ == "__main__":
    keep_memory()
    run(main)
