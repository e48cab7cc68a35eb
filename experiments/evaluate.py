"""Held-out bits per byte of a trained model, beside those of gzip and an order-3 byte model on the same
bytes.

  python -m experiments.evaluate --run=RUN
  python -m experiments.evaluate --run=RUN --max_bytes=200000 --sequence_length=4096

The files are found again as the run's config names them, so they must still be there.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from experiments.configs.checks import TRAINING, check_fields
from experiments.data import (
    Corpus,
    Tokenizer,
    heldout_batches,
    limit_bytes,
    load_tokenizer,
    lost_share,
)
from experiments.data.baselines import gzip_bits_per_byte, order3_bits_per_byte
from experiments.trainer.checkpoints import CheckpointError
from experiments.trainer.runs import corpus_of, load_run, step_named
from experiments.trainer.state import bits_per_byte


class Comparison(NamedTuple):
    """Bits per byte on one list of held-out documents."""

    model: float
    gzip: float  # gzip -9, each document by itself
    order3: float  # counts of the whole training split
    num_bytes: int
    num_documents: int
    lost: float = 0.0  # the share of the bytes that the tokenizer can't give back

    def __str__(self) -> str:
        rows = {"this model": self.model, "gzip -9": self.gzip, "order-3 bytes": self.order3}
        head = f"held out: {self.num_bytes:,} bytes in {self.num_documents:,} documents   bits per byte"
        lines = [head, *(f"  {name:<{len(head) - 12}}{bits:10.3f}" for name, bits in rows.items())]
        if self.lost:
            lines.append(
                f"  the tokenizer can't give back {self.lost:.1%} of these bytes: this model's bits are of "
                "what is left, and compare with no others"
            )
        return "\n".join(lines)


def compare(
    module: Any,
    params: Any,
    corpus: Corpus,
    tokenizer: Tokenizer,
    evaluation: ConfigDict,
    *,
    collections: Mapping[str, Any] | None = None,
) -> Comparison:
    """Measure a model and two simple compressors on the same held-out bytes.

    Args:
        module: a language model.
        params: its parameters.
        corpus: from `experiments.data.find_corpus`.
        tokenizer: from `experiments.data.load_tokenizer`.
        evaluation: batch_size, sequence_length (the model's context at most; gzip's is the document, up to 32
            KiB), max_bytes (0: all that is held out).
        collections: the model's variables that are no params.

    Returns:
        Bits per byte of all three, and the share of the bytes that the tokenizer loses.

    Raises:
        ValueError: nothing is held out, or a size is out of range.
    """
    limit = evaluation.max_bytes or None
    batches = heldout_batches(
        corpus,
        tokenizer,
        batch_size=evaluation.batch_size,
        sequence_length=evaluation.sequence_length,
        limit_bytes=limit,
    )
    spans = limit_bytes(corpus.heldout, limit)
    bits = bits_per_byte(module, params, batches, collections=collections)
    assert bits is not None  # nothing stops it
    return Comparison(
        model=bits,
        gzip=gzip_bits_per_byte(spans),
        order3=order3_bits_per_byte(corpus.train, spans),
        num_bytes=sum(map(len, spans)),
        num_documents=len(spans),
        lost=lost_share(tokenizer, [span.read() for span in spans]),
    )


def evaluate(
    run_dir: str | Path,
    *,
    step: int | str | None = None,
    max_bytes: int | None = None,
    sequence_length: int | None = None,
) -> Comparison:
    """Compare the model that a run trained with compressors, on the files that its config names.

    Args:
        run_dir: what `experiments.train --run` was given.
        step: which checkpoint; None takes the newest, "best" the one with the fewest held-out bits per byte.
        max_bytes: of the held-out documents, 0 for all; None as in the config.
        sequence_length: tokens of context at most; None as in the config.

    Raises:
        CheckpointError: there is no checkpoint, or it can't be read.
        FileNotFoundError: the corpus or the tokenizer is gone.
        ValueError: nothing is held out, or a size is out of range.
    """
    config, module, variables, tokenizer_path, _ = load_run(run_dir, step)
    evaluation = ConfigDict(config.evaluation)
    for name, value in (("max_bytes", max_bytes), ("sequence_length", sequence_length)):
        if value is not None:
            check_fields({f"evaluation.{name}": value}, TRAINING)
            evaluation[name] = value
    corpus = corpus_of(config)
    params = variables.pop("params")
    tokenizer = load_tokenizer(tokenizer_path)
    return compare(module, params, corpus, tokenizer, evaluation, collections=variables)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, print, and turn what the user can mend into one sentence."""
    parser = argparse.ArgumentParser(
        prog="experiments.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", required=True, help="the run's folder: what experiments.train --run was given"
    )
    parser.add_argument("--step", type=step_named, help="which checkpoint: its number, or best (the newest)")
    parser.add_argument("--max_bytes", type=int, help="of the held-out files, 0 for all (as in the config)")
    parser.add_argument("--sequence_length", type=int, help="tokens of context at most (as in the config)")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it opens read-only what is opened read-only
    given = vars(parser.parse_args(arguments))
    try:
        print(evaluate(given.pop("run"), **given))
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"experiments.evaluate: {error}")


if __name__ == "__main__":
    main()
