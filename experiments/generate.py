"""Write text with a trained model.

  python -m experiments.generate --run=RUN --prompt="def "
  python -m experiments.generate --run=RUN --tokens=100000 --temperature=0.8 --top_p=0.95 --top_k=40 --seed=1
  python -m experiments.generate --run=RUN --prompt="def " --stop=$'\\n' --samples=5

The prompt and what follows go to stdout as they come, in as much memory for the last token as for the first.
Ctrl-C ends it. Without a prompt it starts a new document. Several samples come when all of them are written.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from experiments.data import load_tokenizer
from experiments.trainer.checkpoints import CheckpointError
from experiments.trainer.runs import load_run, step_named
from experiments.trainer.sampling import sample_text, sample_texts


def generate(
    run_dir: str | Path,
    prompt: str = "",
    *,
    step: int | str | None = None,
    tokens: int = 400,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: str | None = None,
    samples: int = 1,
    seed: int = 0,
) -> Iterator[str]:
    """Write text that continues `prompt`, piece by piece, with the model that a run trained.

    Args:
        run_dir: what `experiments.train --run` was given.
        prompt: how the document starts; may be empty.
        step: which checkpoint; None takes the newest, "best" the one with the fewest held-out bits per byte.
        tokens: how many at most.
        temperature: 0 takes the likeliest token each time, 1 samples as learned.
        top_p: samples from the likeliest tokens that together have this probability, in (0, 1].
        top_k: samples from so many of the likeliest tokens; 0 from all.
        stop: a text of one token that ends the answer; None for none.
        samples: how many answers, all at once; each of several is one piece.
        seed: another seed, another text.

    Returns:
        An iterator of strings, without the prompt.

    Raises:
        CheckpointError: there is no checkpoint, or it can't be read.
        FileNotFoundError: the run's tokenizer is gone.
        ValueError: an argument is out of range.
    """
    _, module, variables, tokenizer_path, _ = load_run(run_dir, step)
    options: dict[str, Any] = dict(
        steps=tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop, key=jax.random.key(seed)
    )
    start = (module, variables, load_tokenizer(tokenizer_path), prompt)
    if samples == 1:
        return sample_text(*start, **options)
    return iter(sample_texts(*start, samples=samples, **options))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write text, and turn what the user can mend into one sentence."""
    parser = argparse.ArgumentParser(
        prog="experiments.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", required=True, help="the run's folder: what experiments.train --run was given"
    )
    parser.add_argument("--prompt", default="", help="how the document starts")
    parser.add_argument("--step", type=step_named, help="which checkpoint: its number, or best (the newest)")
    parser.add_argument("--tokens", type=int, default=400, help="how many at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (%(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="of the likeliest tokens (%(default)s)")
    parser.add_argument("--top_k", type=int, default=0, help="so many of the likeliest tokens, 0: all")
    parser.add_argument("--stop", help="a text of one token that ends the answer")
    parser.add_argument("--samples", type=int, default=1, help="how many answers (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (%(default)s)")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it opens read-only what is opened read-only
    given = vars(parser.parse_args(arguments))
    try:
        pieces = generate(
            given.pop("run"), given["prompt"], **{k: v for k, v in given.items() if k != "prompt"}
        )
        for piece in [pieces] if given["samples"] == 1 else ([answer] for answer in pieces):
            _write([given["prompt"]])
            _write(piece)
            _write(["\n"])
    except KeyboardInterrupt:
        _write(["\n"])
    except BrokenPipeError:
        # `| head` has seen enough. Python flushes stdout once more as it ends: to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"experiments.generate: {error}")


def _write(pieces: Iterator[str] | Sequence[str]) -> None:
    for piece in pieces:
        # What the terminal's encoding lacks comes out as a question mark.
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
