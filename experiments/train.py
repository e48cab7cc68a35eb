"""Train a language model from a config.

  python -m experiments.train --config=experiments/configs/lm/quickstart.py
  python -m experiments.train --config=experiments/configs/lm/quickstart.py:smoke     every part, in seconds
  python -m experiments.train --config=FILE --config.data.path=FOLDER --run=DIR    your text, its own folder

Every field of a config can be given as --config.a.b=value; experiments/configs/defaults.py says what each
means. Checkpoints, metrics.jsonl, TensorBoard events, loss.png and summary.json go to --run. The same command
again goes on from the last checkpoint, with the losses, bit for bit, of a run that never stopped.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from logging import getLogger
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from experiments.configs.checks import check_config
from experiments.data import heldout_batches, load_tokenizer, make_loader
from experiments.trainer.checkpoints import CheckpointError, Checkpoints, check_same_config
from experiments.trainer.flags import CONFIG, run, run_dir
from experiments.trainer.kept_memory import keep_memory
from experiments.trainer.lock import locked
from experiments.trainer.metrics import Metrics
from experiments.trainer.optimizers import check_optimizer, make_optimizer, schedule
from experiments.trainer.parallel import make_layout
from experiments.trainer.processes import check_same_everywhere, ends_at_once, join_processes
from experiments.trainer.report import report
from experiments.trainer.runs import build_model, build_step, corpus_of, shapes_of
from experiments.trainer.state import bits_per_byte, init_state, params_to_use


class Sigterm:
    """Remembers that SIGTERM came, so that the loop can save; outside of it SIGTERM ends the program.

    Several processes leave the signal to JAX, which tells them all of it (`Checkpoints.reached_preemption`).
    """

    def __init__(self):
        self.came = False

    def __enter__(self) -> "Sigterm":
        # Only the main thread may handle signals, and only it gets them.
        is_main = threading.current_thread() is threading.main_thread()
        self._handles = is_main and jax.process_count() == 1
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "came", True))
        return self

    def __exit__(self, *_) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._before)


def train(config: ConfigDict) -> dict[str, Any] | None:
    """Run a config from its last checkpoint to its end.

    Returns:
      What the run reached, as in summary.json; None where SIGTERM ended it (after a save), and on all
      processes but the first.

    Raises:
      ValueError: a field of the config can't be right, the run's folder is another config's, or another
        process trains in it.
      CheckpointError: a checkpoint can't be written or read.
      FloatingPointError: a step is not finite, or more in a row than `skip_nonfinite`; it names the step.
    """
    check_config(config)
    with locked(config.run_dir) if jax.process_index() == 0 else contextlib.nullcontext():
        return _train(config)


def _train(config: ConfigDict) -> dict[str, Any] | None:
    tokenizer = load_tokenizer(config.data.tokenizer or None)
    config.model.vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if config.model.vocab_size < tokenizer.vocab_size:
        least = f"{tokenizer.vocab_size}, the tokenizer's, or more"
        raise ValueError(f"model.vocab_size: got {config.model.vocab_size}; expected {least}")
    corpus = corpus_of(config)
    check_same_everywhere({"the corpus in data.path": corpus.digest, "data.tokenizer": tokenizer.vocab_size})
    layout = make_layout(config)
    batches = make_loader(
        corpus,
        tokenizer,
        batch_size=config.batch_size,
        sequence_length=config.data.sequence_length,
        seed=config.seed,
        rows=layout.rows,
    )
    module = build_model(config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    if config.ema_decay and config.optimizer.name.startswith("schedule_free"):
        name = config.optimizer.name
        raise ValueError(f"ema_decay: got {config.ema_decay}; expected 0 for {name}, which averages itself")
    check_optimizer(config.optimizer, optimizer, shapes_of(module, config))
    evaluates = config.evaluation.enabled and config.evaluation.every > 0 and bool(corpus.heldout)
    held_out = _held_out(config, corpus, tokenizer) if evaluates else []

    def initial():
        return init_state(
            module, optimizer, config.seed, config.ema_decay, rounding=config.optimizer.rounding
        )

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

    def evaluate(state, stop) -> float | None:
        """Held-out bits per byte; None where `stop` said so."""
        several = jax.process_count() > 1  # they must agree, so none of them stops on its own
        bits: float | None = 0.0
        params, collections = _variables(layout, state)
        if is_first:
            asked = (lambda: False) if several else stop
            bits = bits_per_byte(module, params, held_out, asked, collections=collections)
        if several:
            bits = float(multihost_utils.broadcast_one_to_all(np.float32(bits)))
        if bits is not None and not math.isfinite(bits):  # such bits are nobody's best
            metrics.say(f"{bits} held-out bits per byte: not counted")
            return None
        return bits

    metrics.say(f"{corpus}")
    start = f"goes on from step {done}" if done else "a new run"
    metrics.say(f"{config.run_dir}: {start}, {config.steps} steps in all")
    try:
        if done < config.steps:
            step = build_step(config, module, optimizer, layout)
            with Sigterm() as sigterm:
                state, done, times = run_steps(
                    config,
                    layout,
                    step,
                    state,
                    done,
                    batches,
                    checkpoints,
                    metrics,
                    sigterm,
                    evaluate if evaluates else None,
                )
            if done < config.steps or sigterm.came:
                metrics.say(f"SIGTERM: saved at step {done}; the same command goes on from there")
                return None
        else:
            times = {}
        checkpoints.close()
        variables = _variables(layout, state)
        if not is_first:
            return None
        if (best := checkpoints.best_step()) is not None:
            times |= {"best_step": best, "best_held_out_bits_per_byte": checkpoints.bits_of(best)}
        taken = layout.take(state)
        return report(config, module, taken, variables, corpus, tokenizer, times, say=metrics.say)
    finally:
        metrics.close()
        checkpoints.release()


def _variables(layout, state) -> tuple[Any, Any]:
    """This process's own copy of the params to use and of the collections; all processes must call it."""
    mine = layout.take(state)
    return layout.whole((params_to_use(mine), mine.collections))


def _held_out(config, corpus, tokenizer) -> list[Any]:
    """The batches that are evaluated again and again."""
    return heldout_batches(
        corpus,
        tokenizer,
        batch_size=config.evaluation.batch_size,
        sequence_length=config.evaluation.sequence_length,
        limit_bytes=config.evaluation.max_bytes or None,
    )


def run_steps(
    config, layout, step_function, state, done, batches, checkpoints, metrics, sigterm, evaluate=None
):
    """Take the steps after `done`, saving on the way, until the last one or SIGTERM.

    Returns:
      The state, the number of the last step taken, and what took how long.
    """
    rate = schedule(config.optimizer, config.steps)
    bad_in_a_row = 0
    tokens_a_step = config.batch_size * config.data.sequence_length

    def log(number, values, seconds, bits=None):
        nonlocal bad_in_a_row
        values = {name: float(x) for name, x in jax.device_get(values).items()}
        skipped = int(values.pop("skipped_steps", 0))
        is_finite = all(math.isfinite(x) for x in values.values())
        bad_in_a_row = 0 if is_finite else bad_in_a_row + 1
        if not is_finite:
            found = ", ".join(f"{name} {x}" for name, x in values.items())
            if bad_in_a_row > config.skip_nonfinite:
                checkpoints.wait()
                last = checkpoints.latest_step()
                kept = f"the checkpoint of step {last} is kept" if last else "there is no checkpoint yet"
                raise FloatingPointError(
                    f"step {number} is not finite ({found}); {kept} in {checkpoints.folder}"
                )
            metrics.say(f"step {number} is not finite ({found}): skipped, {skipped} in all")
            values = {}
        if config.skip_nonfinite:
            values["skipped_steps"] = skipped
        values |= {
            "learning_rate": float(rate(number - 1 - skipped)),  # a skipped step is none for the schedule
            "tokens_per_second": round(tokens_a_step / seconds, 1),
        }
        if bits is not None:
            values["held_out_bits_per_byte"] = bits
            metrics.say(f"step {number}: {bits:.4f} held-out bits per byte")
        every = config.log_every
        due = every > 0 and (number % every == 0 or number == config.steps or bits is not None)
        metrics.log(number, values, write=due)

    batch = layout.batch(next(batches))
    start = time.monotonic()
    compiled = layout.compile(step_function, state, batch)
    compile_seconds = time.monotonic() - start
    metrics.say(f"compiled in {compile_seconds:.1f} s")

    start = before = time.monotonic()
    evaluation_seconds = 0.0
    late = []  # metrics are read a step late, so that the devices never wait for this loop
    for number in range(done + 1, config.steps + 1):
        state, values = compiled(state, batch)
        late.append((number, values))
        # Several processes must agree on the step they stop at.
        stop = checkpoints.reached_preemption(number) if jax.process_count() > 1 else sigterm.came
        is_last, every = number == config.steps, config.checkpoint.every
        evaluates = evaluate and not stop and (is_last or number % config.evaluation.every == 0)
        save = stop or is_last or evaluates or (every and number % every == 0)
        bits = None
        while len(late) > (0 if save else 1):  # a state is saved only once its metrics were found finite
            jax.block_until_ready(late[0][1])
            now = time.monotonic()
            seconds, before = now - before, now
            of_step, values = late.pop(0)
            if evaluates and not late:
                bits = evaluate(state, lambda: sigterm.came)
                before = time.monotonic()
                evaluation_seconds += before - now
            log(of_step, values, seconds, bits)
        if save:
            checkpoints.save(number, layout.take(state), batches, config, bits=bits)
        if stop:
            break
        if number < config.steps:
            batch = layout.batch(next(batches))
    checkpoints.wait()
    seconds = time.monotonic() - start - evaluation_seconds
    return (
        state,
        number,
        {"compile_seconds": compile_seconds, "training_seconds": seconds, "steps": number - done},
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
    with ends_at_once():
        try:
            check_config(config)
            join_processes(config)
            train(config)
        except (ValueError, OSError, CheckpointError, FloatingPointError) as error:
            logging.debug("traceback:", exc_info=True)  # --verbosity=1 shows it
            sys.exit(f"experiments.train: {error}")


if __name__ == "__main__":
    keep_memory()
    run(main)
