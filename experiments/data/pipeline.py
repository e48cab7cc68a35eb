"""Batches of packed rows: through Grain for training, as a finite list for evaluation."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from experiments.data.corpus import Corpus
from experiments.data.corpus import limit_bytes as limit_spans
from experiments.data.documents import Documents, open_documents
from experiments.data.packing import Batch, Layout, empty_row, stack
from experiments.data.tokenizer import Tokenizer

_THREADS = 2
_BATCHES_AHEAD = 4
_ENDLESS = 2**62  # rows: Grain has no datasets without a length


def make_loader(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    split: str = "train",
    batch_size: int,
    sequence_length: int,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    num_epochs: int | None = None,
) -> "Loader":
    """Make a Grain iterator of batches of densely packed documents, in an order that follows from `seed`.

    Each epoch packs the documents in another order and shuffles the rows. Neither the rows that step n sees
    nor their order depends on how many processes read: each reads its `rows` of the one batch.

    Args:
        corpus: from `find_corpus`.
        tokenizer: from `load_tokenizer`.
        split: "train" or "heldout".
        batch_size: rows of a step over all processes.
        sequence_length: positions of a row.
        seed: of the order, an integer >= 0.
        rows: which rows of each batch are read here, in this order; None takes all of them.
        num_epochs: None goes on forever. Otherwise the last batch is filled up with rows of weight 0.

    Returns:
        An iterator of dicts: tokens, targets, segment_ids [b, T] int32, weights [b, T] float32 (0 is
        padding), and bytes [b] int32, how many bytes of text the targets of a row stand for; b is len(rows).
        `get_state()` is a small dict for JSON, the same whichever rows are read; `set_state` of it continues
        with the batch that would have come next. It is a `grain.DatasetIterator`.

    Raises:
        ValueError: an argument is out of range, or the split is smaller than one row.

    Example:
        >>> from experiments.data import find_corpus, load_tokenizer
        >>> loader = make_loader(find_corpus(), load_tokenizer(), batch_size=2, sequence_length=64)
        >>> next(loader)["tokens"].shape
        (2, 64)
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split: got {split!r}; expected 'train' or 'heldout'")
    _check_sizes(batch_size, sequence_length)
    rows = range(batch_size) if rows is None else rows
    if not rows or not all(0 <= row < batch_size for row in rows):
        raise ValueError(f"rows: got {tuple(rows)}; expected some of 0 to {batch_size - 1}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs: got {num_epochs}; expected at least 1, or None for no end")
    if seed < 0:
        raise ValueError(f"seed: got {seed}; expected at least 0")
    spans = getattr(corpus, split)
    if not spans:
        raise ValueError(
            f"split: got {split!r}, which is empty in {corpus.root}; expected heldout above 0 in find_corpus"
        )
    documents = open_documents(spans, tokenizer)
    if sequence_length > documents.lengths.sum():
        raise ValueError(
            f"sequence_length: got {sequence_length}; expected at most {documents.lengths.sum()}, the tokens "
            f"of the {split} split of {corpus.root}"
        )
    source = _Rows(documents, batch_size, sequence_length, seed, rows, num_epochs)
    batches = (
        grain.MapDataset.source(source)
        .batch(len(rows))
        .to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BATCHES_AHEAD))
    )
    identity = {
        "corpus": corpus.digest,
        "split": split,
        "vocab_size": tokenizer.vocab_size,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    return Loader(iter(batches), identity)


class Loader(grain.DatasetIterator):
    """A Grain iterator that keeps with its place what it was made of: it does not go on in another corpus."""

    def __init__(self, batches: grain.DatasetIterator, identity: dict[str, Any]):
        super().__init__(batches)
        self._batches = batches
        self._identity = identity

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """JSON: where the next batch is, and what the loader was made of."""
        return {"identity": self._identity, "position": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: it was taken of another corpus, split, seed or size.
        """
        saved = state["identity"]
        names = sorted(saved.keys() | self._identity.keys())
        differing = [name for name in names if saved.get(name) != self._identity.get(name)]
        if differing:
            told = ", ".join(f"{n} was {saved.get(n)} and is {self._identity.get(n)}" for n in differing)
            raise ValueError(f"state: got the place in other data: {told}; expected this loader's")
        self._batches.set_state(state["position"])


class _Rows:
    """Row n of those read here, over all epochs: a Grain random access source."""

    def __init__(
        self,
        documents: Documents,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rows: Sequence[int],
        num_epochs: int | None,
    ):
        self._documents = documents
        self._batch_size = batch_size
        self._sequence_length = sequence_length
        self._seed = seed
        self._rows = tuple(rows)
        self._per_epoch = math.ceil(documents.lengths.sum() / sequence_length)
        self._total = None if num_epochs is None else num_epochs * self._per_epoch
        # Threads ask for the same epoch, or for two neighbours around an epoch's end.
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        if self._total is None:
            return _ENDLESS
        return math.ceil(self._total / self._batch_size) * len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        step, row = divmod(index, len(self._rows))
        place = step * self._batch_size + self._rows[row]
        if self._total is not None and place >= self._total:
            return empty_row(self._sequence_length)
        epoch, place = divmod(place, self._per_epoch)
        layout, rows = self._epoch(epoch)
        return layout.row(int(rows[place]))

    def _shuffle(self, epoch: int) -> tuple[Layout, np.ndarray]:
        random = np.random.default_rng([self._seed, epoch])
        layout = Layout(
            self._documents, random.permutation(len(self._documents.lengths)), self._sequence_length
        )
        return layout, random.permutation(self._per_epoch)


def heldout_batches(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    limit_bytes: int | None = None,
) -> list[Batch]:
    """The held-out split as packed batches, in a fixed order: every byte of it is a target once.

    `limit_bytes(corpus.heldout, n)` are the documents that are covered: what a baseline is to be measured on.

    Args:
        corpus: from `find_corpus`.
        tokenizer: from `load_tokenizer`.
        batch_size: rows of a batch; the last one is filled up with rows of weight 0.
        sequence_length: positions of a row; each row starts without context.
        limit_bytes: takes the first documents of the split that make up so many bytes. None takes all.

    Returns:
        Batches as `make_loader` gives them. Bits per byte are the nats of all targets of weight 1, over ln 2,
        over the sum of "bytes".

    Raises:
        ValueError: a size is below 1, or nothing is held out.
    """
    _check_sizes(batch_size, sequence_length)
    spans = limit_spans(corpus.heldout, limit_bytes)
    if not spans:
        raise ValueError(
            f"corpus: got {corpus.root} with nothing held out; expected heldout above 0 in find_corpus"
        )
    documents = open_documents(spans, tokenizer)
    layout = Layout(documents, np.arange(len(spans)), sequence_length)
    rows = [layout.row(index) for index in range(len(layout))]
    rows += [empty_row(sequence_length)] * (-len(rows) % batch_size)
    return [stack(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; expected at least 1")
    if sequence_length < 1:
        raise ValueError(f"sequence_length: got {sequence_length}; expected at least 1")
