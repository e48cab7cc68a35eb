"""Compressors on the held-out files: bits per byte to read a model's beside."""

import gzip
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from experiments.data import Span

_ORDER = 3
_COUNTED_TOGETHER = 2**24  # bounds the memory for sorting to some hundred MB
_NO_BYTES = "documents: got no bytes; expected at least one"


def gzip_bits_per_byte(spans: Sequence[Span]) -> float:
    """gzip -9 of each document by itself: 8 times the summed sizes of the .gz files, over the documents'
    bytes.

    The 18 bytes of gzip's header and trailer count; a file name, which gzip may store, does not.

    Args:
        spans: the held-out documents.

    Raises:
        ValueError: there is not a byte in them.
    """
    documents = [span.read() for span in spans]
    return 8 * sum(len(gzip.compress(data, 9)) for data in documents) / _total(documents)


def order3_bits_per_byte(train: Sequence[Span], heldout: Sequence[Span]) -> float:
    """An order-3 byte model: counts of the training documents, bits on the held-out ones, in seconds.

    Args:
        train: documents to count.
        heldout: documents to predict, none of which is counted.

    Raises:
        ValueError: there is not a byte in one of the two.
    """
    return ByteNgram(span.read() for span in train).bits_per_byte([span.read() for span in heldout])


class ByteNgram:
    """Predicts a byte from the three before it, by Witten-Bell interpolation of orders 3, 2, 1, 0 and 1/256.

    With c(h, w) counts of byte w after history h, c(h) their sum, and d(h) how many different bytes were seen
    after h:

        p(w | h) = (c(h, w) + d(h) p(w | h')) / (c(h) + d(h)),  h' being h without its first byte

    Before a document stand three bytes 0, as the separator stands before it for a model.

    Args:
        documents: bytes to count.

    Raises:
        ValueError: there is not a byte in them.

    Source: Witten and Bell, 1991, "The zero-frequency problem", method C.

    Example:
        >>> ByteNgram([b"abab" * 100]).bits_per_byte([b"abababab"]) < 1
        True
    """

    def __init__(self, documents: Iterable[bytes]):
        keys, counts = _count(documents)
        self._tables = []  # of order 3 first
        for order in range(_ORDER, -1, -1):
            self._tables.append(_Table(keys, counts))
            # One byte less of history: the same positions counted by what is left of their keys.
            keys, counts = _merge(keys & np.uint32(256**order - 1), counts)

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """The mean of -log2 p over all bytes of `documents`."""
        total = _total(documents)
        return float(self.bits(documents).sum() / total)

    def bits(self, documents: Sequence[bytes]) -> np.ndarray:
        """-log2 p of every byte of `documents`, one after the other: float64 [bytes]."""
        keys = np.concatenate([_keys(data) for data in documents])
        probability = np.full(len(keys), 1 / 256)
        for order, table in zip(range(_ORDER + 1), reversed(self._tables), strict=True):
            probability = table.interpolate(keys & np.uint32(256 ** (order + 1) - 1), probability)
        return -np.log2(probability)


class _Table:
    """Counts of one order. A key is the history's bytes and then the byte, the last byte lowest."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray):
        self._keys, self._counts = keys, counts
        # The keys are sorted, so those of one history stand together.
        self._histories, first, self._distinct = np.unique(keys >> 8, return_index=True, return_counts=True)
        self._totals = np.add.reduceat(counts, first)

    def interpolate(self, keys: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """p of every key [n], given p by one byte less of history [n]."""
        count = _look_up(self._keys, self._counts, keys)
        total = _look_up(self._histories, self._totals, keys >> 8)
        distinct = _look_up(self._histories, self._distinct, keys >> 8)
        seen = total > 0  # of a history never seen there is nothing to add
        return np.where(seen, (count + distinct * shorter) / np.where(seen, total + distinct, 1), shorter)


def _keys(data: bytes) -> np.ndarray:
    """Every byte with the three before it, as uint32 [bytes]."""
    padded = np.frombuffer(bytes(_ORDER) + data, np.uint8).astype(np.uint32)
    end = len(padded)
    keys = np.zeros(len(data), np.uint32)
    for back in range(_ORDER + 1):
        keys |= padded[_ORDER - back : end - back] << np.uint32(8 * back)
    return keys


def _count(documents: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The different keys in order, and how often each occurs."""
    keys, counts = np.zeros(0, np.uint32), np.zeros(0, np.int64)
    for together in _gather(documents):
        new_keys, new_counts = np.unique(np.concatenate(together), return_counts=True)
        keys, counts = _merge(np.concatenate([keys, new_keys]), np.concatenate([counts, new_counts]))
    if not len(keys):
        raise ValueError(_NO_BYTES)
    return keys, counts


def _gather(documents: Iterable[bytes]) -> Iterator[list[np.ndarray]]:
    """Keys of so many documents at a time as are counted together."""
    waiting, size = [], 0
    for data in documents:
        waiting.append(_keys(data))
        size += len(data)
        if size >= _COUNTED_TOGETHER:
            yield waiting
            waiting, size = [], 0
    if size:
        yield waiting


def _merge(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal keys as one, with the sum of their counts; sorted."""
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(counts, first)


def _look_up(sorted_keys: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """values[i] where sorted_keys[i] is the key, 0 where none is."""
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[place] == keys, values[place], 0)


def _total(documents: Sequence[bytes]) -> int:
    total = sum(map(len, documents))
    if total == 0:
        raise ValueError(_NO_BYTES)
    return total
