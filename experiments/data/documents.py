"""Documents as token ids: read when needed for bytes, encoded once for a subword tokenizer."""

import logging
from typing import Protocol

import numpy as np

from experiments.data.corpus import Span
from experiments.data.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer

_ENCODED_TOGETHER = 64  # documents that the tokenizer's threads share


class Documents(Protocol):
    """Random access to the token ids of documents, without the separator before each."""

    lengths: np.ndarray  # [documents] how many ids each has
    separator: int

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """ids [stop - start + 1] int32: [start, stop), and the one before them (the separator at 0)."""
        ...

    def count_bytes(self, document: int, start: int, stop: int) -> int:
        """Count the bytes of text that the ids of [start, stop) stand for."""
        ...


def open_documents(spans: tuple[Span, ...], tokenizer: Tokenizer) -> Documents:
    """Random access to `spans` as ids of `tokenizer`."""
    if isinstance(tokenizer, ByteTokenizer):
        return _ByteDocuments(spans, tokenizer.separator)
    return _SubwordDocuments(spans, tokenizer)


class _ByteDocuments:
    """Opens in the time of a stat each, holds nothing in memory."""

    def __init__(self, spans: tuple[Span, ...], separator: int):
        self._spans = spans
        self.separator = separator
        self.lengths = np.array([len(span) for span in spans], np.int64)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        span = self._spans[document]
        ids = np.empty(stop - start + 1, np.int32)
        first = max(start - 1, 0)
        ids[0] = self.separator
        ids[len(ids) - (stop - first) :] = np.frombuffer(
            Span(span.path, span.start + first, span.start + stop).read(), np.uint8
        )
        return ids

    def count_bytes(self, document: int, start: int, stop: int) -> int:
        return stop - start


class _SubwordDocuments:
    """Encodes everything at the start, on all cores: some seconds for every 10 MB."""

    def __init__(self, spans: tuple[Span, ...], tokenizer: SubwordTokenizer):
        self.separator = tokenizer.separator
        encoded = []
        for first in range(0, len(spans), _ENCODED_TOGETHER):
            texts = [span.read() for span in spans[first : first + _ENCODED_TOGETHER]]
            encoded += tokenizer.encode_with_ends(texts)
        self._ids = [ids for ids, _ in encoded]
        self._ends = [ends for _, ends in encoded]
        self.lengths = np.array([len(ids) for ids in self._ids], np.int64)
        logging.getLogger(__name__).info("encoded %d documents as %d tokens", len(spans), self.lengths.sum())

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        before = self._ids[document][start - 1] if start else self.separator
        return np.concatenate([np.array([before], np.int32), self._ids[document][start:stop]])

    def count_bytes(self, document: int, start: int, stop: int) -> int:
        ends = self._ends[document]
        return int(ends[stop - 1] - (ends[start - 1] if start else 0))
