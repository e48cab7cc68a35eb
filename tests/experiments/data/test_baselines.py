"""Baselines against zlib, hand-computed probabilities and a plain dictionary form of the same equation."""

import collections
import math
import zlib

import numpy as np
import pytest

from experiments.data import Span, baselines
from experiments.data.baselines import ByteNgram, gzip_bits_per_byte, order3_bits_per_byte


def _spans(folder, *documents: bytes) -> list[Span]:
    for number, data in enumerate(documents):
        (folder / f"{number}.txt").write_bytes(data)
    return [Span(str(folder / f"{number}.txt"), 0, len(data)) for number, data in enumerate(documents)]


def _deflated(data: bytes) -> int:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return len(compressor.compress(data) + compressor.flush())


def test_gzip_is_each_documents_deflate_stream_and_18_bytes(tmp_path):
    documents = [b"import os\n" * 50, bytes(range(256))]
    expected = 8 * sum(_deflated(data) + 18 for data in documents) / sum(map(len, documents))
    assert gzip_bits_per_byte(_spans(tmp_path, *documents)) == expected


def test_gzip_reads_only_the_span(tmp_path):
    (span,) = _spans(tmp_path, b"a" * 1000 + bytes(range(256)))
    tail = Span(span.path, 1000, 1256)
    assert gzip_bits_per_byte([tail]) == 8 * (_deflated(bytes(range(256))) + 18) / 256


def test_witten_bell_by_hand():
    """From the counts of "aab", the bytes of "ab".

    Order 0 counts a twice and b once: p(a) = (2 + 2/256) / 5 and p(b) = (1 + 2/256) / 5. At the start every
    history is zeros, after which only a was seen, once: each order gives p(a) = (1 + p) / 2. After "a", a and
    b were seen once each: p(b) = (1 + 2 p) / 4. After "0a" and "00a" only a was seen, once: b gets p / 2 of
    each.
    """
    p_a = (2 + 2 / 256) / 5
    for _ in range(3):
        p_a = (1 + p_a) / 2
    p_b = (1 + 2 * (1 + 2 / 256) / 5) / 4
    p_b = p_b / 2 / 2
    np.testing.assert_allclose(2 ** -ByteNgram([b"aab"]).bits([b"ab"]), [p_a, p_b], rtol=1e-12)


class _Plain:
    """The same model as nested dictionaries and a recursion."""

    def __init__(self, documents):
        self.counts = collections.defaultdict(collections.Counter)
        for data in documents:
            padded = bytes(3) + data
            for at in range(3, len(padded)):
                for order in range(4):
                    self.counts[padded[at - order : at]][padded[at]] += 1

    def probability(self, history: bytes | None, byte: int) -> float:
        if history is None:
            return 1 / 256
        shorter = self.probability(history[1:] if history else None, byte)
        seen = self.counts.get(history)
        return (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen)) if seen else shorter


@pytest.mark.parametrize("counted_together", [7, 2**24])
def test_ngram_equals_the_plain_form(monkeypatch, counted_together):
    monkeypatch.setattr(baselines, "_COUNTED_TOGETHER", counted_together)
    random = np.random.default_rng(0)
    train = [random.integers(0, 4, size, np.uint8).tobytes() for size in (1, 2, 3, 50, 400)] + [
        b"",
        b"\xff\x00\xff",
    ]
    heldout = [random.integers(0, 5, size, np.uint8).tobytes() for size in (1, 4, 99)] + [b"\xff\x00z"]
    plain = _Plain(train)
    expected = []
    for data in heldout:
        padded = bytes(3) + data
        expected += [
            -math.log2(plain.probability(padded[at - 3 : at], padded[at])) for at in range(3, len(padded))
        ]
    np.testing.assert_allclose(ByteNgram(train).bits(heldout), expected, rtol=1e-12)


def test_probabilities_sum_to_one():
    model = ByteNgram([b"the cat sat on the mat", b"the dog"])
    for history in (b"", b"t", b"th", b"the", b"\x80\x81\x82"):
        bits = [model.bits([history + bytes([byte])])[-1] for byte in range(256)]
        np.testing.assert_allclose(np.sum(2 ** -np.array(bits)), 1, rtol=1e-12)


def test_order3_learns_from_the_training_split(tmp_path):
    text = b"for item in items: total += item\n" * 20
    spans = _spans(tmp_path, text, text[:200], bytes(range(256)))
    assert order3_bits_per_byte(spans[:1], spans[1:2]) < 0.5
    assert order3_bits_per_byte(spans[:1], spans[2:]) > 8  # unlike anything counted


@pytest.mark.parametrize("empty", [[], [b""]])
def test_no_bytes(tmp_path, empty):
    spans = _spans(tmp_path, *empty)
    for call in (
        lambda: gzip_bits_per_byte(spans),
        lambda: ByteNgram(empty),
        lambda: ByteNgram([b"a"]).bits_per_byte(empty),
    ):
        with pytest.raises(ValueError, match="got no bytes"):
            call()
