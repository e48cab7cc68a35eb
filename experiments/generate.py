"""Write text with a trained model.

  python -m experiments.generate --run=RUN --prompt="def "
  python -m experiments.generate --run=RUN --tokens=100000 --temperature=0.8 --top_p=0.95 --seed=1

The prompt and what follows go to stdout as they come, in as much memory for the last token as for the first.
Ctrl-C ends it. Without a prompt it starts a new document.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import logging

from experiments.data import load_tokenizer
from experiments.trainer.checkpoints import CheckpointError
from experiments.trainer.runs import load_run
from experiments.trainer.sampling import sample_text


def generate(
    run_dir: str | Path,
    prompt: str = "",
    *,
    step: int | None = None,
    tokens: int = 400,
    temperature: float = 0.8,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Text that continues `prompt`, piece by piece, by the model that a run trained.

    Args:
        run_dir: what `experiments.train --run` was given.
        prompt: how the document starts; may be empty.
        step: which checkpoint; None takes the newest.
        tokens: how many.
        temperature: 0 takes the likeliest token each time, 1 samples as learned.
        top_p: samples from the likeliest tokens that together have this probability, in (0, 1].
        seed: another seed, another text.

    Returns:
        An iterator of strings, without the prompt.

    Raises:
        CheckpointError: there is no checkpoint, or it can't be read.
        FileNotFoundError: the run's tokenizer is gone.
        ValueError: an argument is out of range.
    """
    _, module, variables, tokenizer_path, _ = load_run(run_dir, step)
    return sample_text(
        module,
        variables,
        load_tokenizer(tokenizer_path),
        prompt,
        steps=tokens,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(seed),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write text, and turn what the user can mend into one sentence."""
    parser = argparse.ArgumentParser(
        prog="experiments.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", required=True, help="the run's folder: what experiments.train --run was given"
    )
    parser.add_argument("--prompt", default="", help="how the document starts")
    parser.add_argument("--step", type=int, help="which checkpoint (the newest)")
    parser.add_argument("--tokens", type=int, default=400, help="how many (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (%(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="of the likeliest tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (%(default)s)")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it opens read-only what is opened read-only
    given = vars(parser.parse_args(arguments))
    try:
        pieces = generate(
            given.pop("run"), given["prompt"], **{k: v for k, v in given.items() if k != "prompt"}
        )
        _write([given["prompt"]])
        _write(pieces)
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
