"""Documents laid end to end and cut into rows of one length.

Every id of a document is a target once, and its input is the id before it in the same document, or the
separator: no target crosses documents, and no position but the last row's rest is wasted.

    documents   a b c | x y          rows of 4
    inputs      ^ a b ^ | x 0 0 0    ^ is the separator
    targets     a b c x | y 0 0 0
    segment_ids 1 1 1 2 | 1 0 0 0    0 is padding
    weights     1 1 1 1 | 1 0 0 0
"""

from collections.abc import Sequence

import numpy as np

from experiments.data.documents import Documents

Batch = dict[str, np.ndarray]


class Layout:
    """Places in the documents of each row of `sequence_length` positions, for one order of the documents."""

    def __init__(self, documents: Documents, order: np.ndarray, sequence_length: int):
        self._documents = documents
        self._order = order
        self._sequence_length = sequence_length
        self._ends = np.cumsum(documents.lengths[order])  # in the stream of all documents, in order

    def __len__(self) -> int:
        return int(-(-self._ends[-1] // self._sequence_length))

    def row(self, index: int) -> Batch:
        """tokens, targets, segment_ids, weights [T], and the bytes of text that its targets stand for."""
        row = empty_row(self._sequence_length)
        at, stream = 0, index * self._sequence_length
        segment = 0
        place = int(np.searchsorted(self._ends, stream, side="right"))  # skips documents without ids
        while at < self._sequence_length and place < len(self._order):
            document = int(self._order[place])
            length = int(self._documents.lengths[document])
            start = stream + at - int(self._ends[place]) + length
            stop = min(length, start + self._sequence_length - at)
            if stop > start:
                segment += 1
                ids = self._documents.read(document, start, stop)
                here = slice(at, at + stop - start)
                row["tokens"][here] = ids[:-1]
                row["targets"][here] = ids[1:]
                row["segment_ids"][here] = segment
                row["weights"][here] = 1
                row["bytes"] += self._documents.count_bytes(document, start, stop)
                at += stop - start
            place += 1
        return row


def empty_row(sequence_length: int) -> Batch:
    """A row of padding: no weight, no bytes."""
    return {
        "tokens": np.zeros(sequence_length, np.int32),
        "targets": np.zeros(sequence_length, np.int32),
        "segment_ids": np.zeros(sequence_length, np.int32),
        "weights": np.zeros(sequence_length, np.float32),
        "bytes": np.zeros((), np.int32),
    }


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows as one batch: a leading axis on every array."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
