"""Train a language model from a config.

  python -m experiments.train --config=experiments/configs/lm/quickstart.py
  python -m experiments.train --config=experiments/configs/lm/quickstart.py:smoke     every part, in seconds
  python -m experiments.train --config=FILE --config.data.path=FOLDER --run=DIR    your text, its own folder

Every field of a config can be given as --config.a.b=value; experiments/configs/defaults.py says what each
means. Checkpoints, metrics.jsonl, TensorBoard events, loss.png and summary.json go to --run. The same command
again goes on from the last checkpoint, with the losses, bit for bit, of a run that never stopped.
"""

import math
import signal
import sys
import time
from logging import getLogger
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from experiments.data import find_corpus, load_tokenizer, make_loader
from experiments.trainer.checkpoints import CheckpointError, Checkpoints, check_same_config
from experiments.trainer.flags import CONFIG, run, run_dir
from experiments.trainer.huge_pages import use_huge_pages
from experiments.trainer.metrics import Metrics
from experiments.trainer.optimizers import make_optimizer, schedule
from experiments.trainer.parallel import make_layout
from experiments.trainer.report import report
from experiments.trainer.runs import build_model
from experiments.trainer.state import init_state, make_train_step


class Sigterm:
    """Remembers that SIGTERM came, so that the loop can save before it ends."""

    def __init__(self):
        self.came = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "came", True))


def train(config: ConfigDict) -> dict[str, Any] | None:
    """Run a config from its last checkpoint to its end.

    Returns:
      What the run reached, as in summary.json; None where SIGTERM ended it (after a save), and on all
      processes but the first.

    Raises:
      ValueError: a field of the config can't be right, or the run's folder is another config's.
      CheckpointError: a checkpoint can't be written or read.
      FloatingPointError: the loss is not finite; it names the step.
    """
    sigterm = Sigterm()
    tokenizer = load_tokenizer(config.data.tokenizer or None)
    config.model.vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if config.model.vocab_size < tokenizer.vocab_size:
        least = f"{tokenizer.vocab_size}, the tokenizer's, or more"
        raise ValueError(f"model.vocab_size: got {config.model.vocab_size}; expected {least}")
    corpus = find_corpus(config.data.path or None, heldout=config.data.held_out)
    layout = make_layout(config)
    batches = make_loader(
        corpus,
        tokenizer,
        batch_size=config.batch_size,
        seq_len=config.data.sequence_length,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    module = build_model(config)
    optimizer = make_optimizer(config.optimizer, config.steps)

    def initial():
        return init_state(module, optimizer, config.seed, config.ema_decay)

    checkpoints = Checkpoints(config.run_dir, keep=config.checkpoint.keep)
    done = checkpoints.latest_step() or 0
    if done:
        check_same_config(checkpoints.about(done)["config"], config, config.run_dir)
        state = layout.put(checkpoints.restore(done, layout.abstract(initial), batches))
    else:
        state = layout.create(initial)

    is_first = jax.process_index() == 0
    metrics = Metrics(
        config.run_dir, first_step=done, steps=config.steps, tensorboard=config.tensorboard, enabled=is_first
    )
    metrics.say(f"{corpus}")
    start = f"goes on from step {done}" if done else "a new run"
    metrics.say(f"{config.run_dir}: {start}, {config.steps} steps in all")
    try:
        if done < config.steps:
            step = make_train_step(
                module,
                optimizer,
                accumulate=config.accumulate,
                ema_decay=config.ema_decay,
                axis_name=layout.axis_name,
            )
            state, done, times = run_steps(
                config, layout, step, state, done, batches, checkpoints, metrics, sigterm
            )
            if done < config.steps:
                metrics.say(f"SIGTERM: saved at step {done}; the same command goes on from there")
                return None
        else:
            times = {}
        checkpoints.close()
        if not is_first:
            return None
        # This process's copy: what only one process computes must not involve the devices of the others.
        mine = jax.tree.map(lambda x: x.addressable_data(0), layout.take(state))
        return report(config, module, mine, corpus, tokenizer, times, say=metrics.say)
    finally:
        metrics.close()


def run_steps(config, layout, step_function, state, done, batches, checkpoints, metrics, sigterm):
    """Take the steps after `done`, saving on the way, until the last one or SIGTERM.

    Returns:
      The state, the number of the last step taken, and what took how long.
    """
    rate = schedule(config.optimizer, config.steps)
    tokens_a_step = config.batch_size * config.data.sequence_length

    def log(number, values, seconds):
        values = {name: float(x) for name, x in jax.device_get(values).items()}
        if not all(math.isfinite(x) for x in values.values()):
            found = ", ".join(f"{name} {x}" for name, x in values.items())
            checkpoints.wait()
            last = checkpoints.latest_step()
            kept = f"the checkpoint of step {last} is kept" if last else "there is no checkpoint yet"
            raise FloatingPointError(f"step {number} is not finite ({found}); {kept} in {checkpoints.folder}")
        values |= {
            "learning_rate": float(rate(number - 1)),
            "tokens_per_second": round(tokens_a_step / seconds, 1),
        }
        metrics.log(number, values, write=number % config.log_every == 0 or number == config.steps)

    batch = layout.batch(next(batches))
    start = time.monotonic()
    compiled = layout.compile(step_function, state, batch)
    compile_seconds = time.monotonic() - start
    metrics.say(f"compiled in {compile_seconds:.1f} s")

    start = before = time.monotonic()
    late = []  # metrics are read a step late, so that the devices never wait for this loop
    for number in range(done + 1, config.steps + 1):
        state, values = compiled(state, batch)
        late.append((number, values))
        # Several processes must agree on the step they stop at.
        stop = checkpoints.reached_preemption(number) if jax.process_count() > 1 else sigterm.came
        save = stop or number == config.steps or number % config.checkpoint.every == 0
        while len(late) > (0 if save else 1):  # a state is saved only once its metrics were found finite
            jax.block_until_ready(late[0][1])
            now = time.monotonic()
            log(*late.pop(0), seconds=now - before)
            before = now
        if save:
            checkpoints.save(number, layout.take(state), batches, config)
        if stop:
            break
        if number < config.steps:
            batch = layout.batch(next(batches))
    checkpoints.wait()
    seconds = time.monotonic() - start
    return (
        state,
        number,
        {"compile_seconds": compile_seconds, "training_seconds": seconds, "steps": number - done},
    )


def join_processes(config: ConfigDict) -> None:
    """Connect to the other processes, if `config.distributed` says so; before anything touches a device."""
    d = config.distributed
    if not d.enabled:
        return
    jax.distributed.initialize(
        coordinator_address=d.coordinator or None,
        num_processes=d.processes or None,
        process_id=d.process if d.process >= 0 else None,
    )


def main(argv: list[str]) -> None:
    """Parse flags, train, and turn what the user can mend into one sentence."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; fields of the config are given as --config.a.b=value")
    if CONFIG.value is None:
        raise app.UsageError("--config is missing; expected --config=experiments/configs/lm/quickstart.py")
    config = CONFIG.value
    config.run_dir = run_dir()
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
        getLogger("frugax.optim").setLevel("INFO")  # which leaves an optimizer treats as matrices
    try:
        join_processes(config)
        train(config)
    except (ValueError, OSError, CheckpointError, FloatingPointError) as error:
        logging.debug("traceback:", exc_info=True)  # --verbosity=1 shows it
        sys.exit(f"experiments.train: {error}")


if __name__ == "__main__":
    use_huge_pages()
    run(main)
