"""Evaluation: bits per byte by hand, on the very bytes that the baselines are measured on."""

import gzip
import math

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import linen as nn
from ml_collections import ConfigDict

from experiments import evaluate as evaluate_module
from experiments.data import find_corpus, load_tokenizer
from experiments.evaluate import compare, evaluate, main


class Context(nn.Module):
    """A quarter to the last byte again, the rest to all 256 alike; in a document's first position, all alike.

    The segment ids say where a document starts, so this fails where they don't arrive.
    """

    vocab_size: int = 256

    @nn.compact
    def __call__(self, tokens, state=None, segment_ids=None):
        again = jnp.log(256 * 0.25 / 0.75 + 1)  # so that p(again) = 0.25 + 0.75 / 256
        starts = jnp.concatenate([jnp.ones_like(segment_ids[:, :1]), jnp.diff(segment_ids)], axis=1) != 0
        one_hot = jnp.arange(self.vocab_size)[None, None] == tokens[..., None]
        return jnp.where(one_hot & ~starts[..., None], again, 0.0), state


def _bits(document: bytes, sequence_length: int) -> float:
    """Bits of one document, in rows of sequence_length from its start."""
    total = 0.0
    for at, byte in enumerate(document):
        if at % sequence_length == 0:
            total += 8
        else:
            total -= math.log2(0.75 / 256 + 0.25 * (document[at - 1] == byte))
    return total


def _evaluation(**changed) -> ConfigDict:
    return ConfigDict({"batch_size": 3, "sequence_length": 16, "max_bytes": 0, **changed})


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"".join(b"aab%d %s\n" % (n, b"x" * (n % 7)) for n in range(300)))
    return path


@pytest.mark.parametrize(("sequence_length", "max_bytes"), [(16, 0), (7, 100), (1000, 0)])
def test_bits_per_byte_by_hand(book, sequence_length, max_bytes):
    corpus = find_corpus(book, heldout=0.1)
    held_out = corpus.heldout[0].read()[: max_bytes or None]
    result = compare(
        Context(),
        {},
        corpus,
        load_tokenizer(None),
        _evaluation(sequence_length=sequence_length, max_bytes=max_bytes),
    )
    np.testing.assert_allclose(result.model, _bits(held_out, sequence_length) / len(held_out), rtol=1e-5)
    assert (result.num_bytes, result.num_documents) == (len(held_out), 1)
    assert result.gzip == 8 * len(gzip.compress(held_out, 9)) / len(held_out)
    assert 0 < result.order3 < 8


def test_documents_count_by_their_bytes(tmp_path):
    """Uniform logits cost log2(vocabulary) a token, so bits per byte follow from the number of tokens."""
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("the größe " * (number + 1), encoding="utf-8")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "größe": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / ".tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / ".tokenizer.json"))
    corpus = find_corpus(tmp_path, heldout=0.4)

    class Uniform(nn.Module):
        @nn.compact
        def __call__(self, tokens, state=None, segment_ids=None):
            return jnp.zeros((*tokens.shape, tokenizer.vocab_size)), state

    result = compare(Uniform(), {}, corpus, tokenizer, _evaluation())
    held_out = [span.read().decode() for span in corpus.heldout]
    assert result.num_documents == len(held_out) >= 2
    bits = sum(len(text.split()) for text in held_out) * math.log2(tokenizer.vocab_size)
    np.testing.assert_allclose(result.model, bits / sum(len(text.encode()) for text in held_out), rtol=1e-5)
    assert result.lost == 0
    assert "give back" not in str(result)


def test_what_the_tokenizer_loses_is_said(tmp_path):
    """A model predicts the one unknown token, which every word is, for nothing: bits that say nothing."""
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("some text " * 9)
    unknown = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    unknown.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    unknown.save(str(tmp_path / ".tokenizer.json"))

    class Certain(nn.Module):
        @nn.compact
        def __call__(self, tokens, state=None, segment_ids=None):
            return jnp.broadcast_to(jnp.array([100.0, 0.0]), (*tokens.shape, 2)), state

    corpus = find_corpus(tmp_path, heldout=0.3)
    result = compare(Certain(), {}, corpus, load_tokenizer(str(tmp_path / ".tokenizer.json")), _evaluation())
    assert result.model == 0
    assert result.lost == 1
    assert "can't give back 100.0% of these bytes" in str(result)


@pytest.fixture
def run(monkeypatch, book):
    config = ConfigDict({"data": {"path": str(book), "held_out": 0.1}, "evaluation": _evaluation()})
    monkeypatch.setattr(
        evaluate_module, "load_run", lambda run_dir, step: (config, Context(), {"params": {}}, None, 5)
    )
    return config


def test_a_run_is_evaluated_as_its_config_says_unless_told_otherwise(run, book):
    corpus = find_corpus(book, heldout=0.1)
    whole = sum(map(len, corpus.heldout))
    assert evaluate("run").num_bytes == whole
    assert evaluate("run", max_bytes=50).num_bytes == 50
    assert evaluate("run", max_bytes=50).model < evaluate("run", max_bytes=50, sequence_length=2).model
    run.evaluation.max_bytes = 60
    assert evaluate("run").num_bytes == 60
    assert evaluate("run", max_bytes=0).num_bytes == whole


def test_command_line(run, capsys):
    main(["--run=run", "--max_bytes=80"])
    shown = capsys.readouterr().out
    assert "80 bytes in 1 documents" in shown
    result = evaluate("run", max_bytes=80)
    for name, value in (
        ("this model", result.model),
        ("gzip -9", result.gzip),
        ("order-3 bytes", result.order3),
    ):
        (line,) = [line for line in shown.splitlines() if name in line]
        assert float(line.split()[-1]) == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sequence_length=0"], "evaluation.sequence_length: got 0; expected an integer of at least 1"),
        (["--max_bytes=-1"], "evaluation.max_bytes: got -1; expected an integer of at least 0"),
    ],
)
def test_command_line_errors(run, arguments, words):
    with pytest.raises(SystemExit, match=words):
        main(["--run=run", *arguments])


def test_corpus_that_is_gone(run, book):
    book.unlink()
    with pytest.raises(SystemExit, match=r"book\.txt"):
        main(["--run=run"])
