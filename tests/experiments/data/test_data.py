"""Batches: every byte once an epoch, no target across documents, exact resumption, errors."""

import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.data import find_corpus, heldout_batches, limit_bytes, load_tokenizer, make_loader

_BYTES = load_tokenizer(None)


def _documents_of(batches, separator: int = 0) -> list[tuple[list[int], bool]]:
    """The ids of each segment, and whether it begins its document. Checks each row on the way."""
    found = []
    for batch in batches:
        for tokens, targets, segments, weights in zip(
            batch["tokens"], batch["targets"], batch["segment_ids"], batch["weights"], strict=True
        ):
            assert set(weights) <= {0, 1}
            np.testing.assert_array_equal(segments > 0, weights > 0)
            used = int(weights.sum())
            assert (segments[used:] == 0).all(), "padding is at the end"
            boundaries = np.flatnonzero(np.diff(segments[:used])) + 1
            numbers = segments[np.concatenate([[0], boundaries]).astype(int)] if used else []
            np.testing.assert_array_equal(numbers, 1 + np.arange(len(numbers)))
            for piece in np.split(np.arange(used), boundaries) if used else []:
                np.testing.assert_array_equal(tokens[piece][1:], targets[piece][:-1])
                assert piece[0] == 0 or tokens[piece[0]] == separator, (
                    "a segment begins where no document does"
                )
                found.append((targets[piece].tolist(), tokens[piece][0] == separator))
    return found


def _contains_all(pieces, documents: list[list[int]]) -> None:
    """The pieces are the documents, each cut at some places: every id once, and nothing else."""
    assert sum(len(piece) for piece, _ in pieces) == sum(map(len, documents))
    rest = sorted(piece for piece, _ in pieces)
    for document in sorted(documents, key=len, reverse=True):
        begun = _take(rest, document, 0)
        assert begun, "a document has no place in the rows"
    assert not rest


def _take(rest: list[list[int]], document: list[int], at: int) -> bool:
    """Removes pieces from `rest` that make up document[at:]. Where there are none: False, none removed."""
    if at == len(document):
        return True
    for piece in [p for p in rest if document[at : at + len(p)] == p]:
        rest.remove(piece)
        if _take(rest, document, at + len(piece)):
            return True
        rest.append(piece)
    return False


def _equal(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@pytest.mark.parametrize(("batch_size", "sequence_length"), [(1, 1), (3, 7), (4, 64), (2, 1000)])
def test_an_epoch_has_every_byte_once_as_the_target_of_the_one_before_it(folder, batch_size, sequence_length):
    corpus = find_corpus(folder)
    batches = list(
        make_loader(
            corpus, _BYTES, batch_size=batch_size, sequence_length=sequence_length, seed=3, num_epochs=1
        )
    )
    for batch in batches:
        assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
            "tokens": ((batch_size, sequence_length), "int32"),
            "targets": ((batch_size, sequence_length), "int32"),
            "segment_ids": ((batch_size, sequence_length), "int32"),
            "weights": ((batch_size, sequence_length), "float32"),
            "bytes": ((batch_size,), "int32"),
        }
        np.testing.assert_array_equal(batch["bytes"], batch["weights"].sum(1))
    pieces = _documents_of(batches)
    if sequence_length > 1:  # pieces of one byte fit anywhere
        _contains_all(pieces, [list(span.read()) for span in corpus.train])
    counts = np.bincount([b for piece, _ in pieces for b in piece], minlength=256)
    np.testing.assert_array_equal(
        counts, np.bincount(list(b"".join(span.read() for span in corpus.train)), minlength=256)
    )
    # No document has a byte 0, so an input of 0 is a beginning.
    assert sum(begins for _, begins in pieces) == len(corpus.train)
    # Dense: only the epoch's last row has padding, and then rows that fill the last batch.
    rows = -(-sum(map(len, corpus.train)) // sequence_length)
    assert sum(batch["weights"].any(1).sum() for batch in batches) == rows
    assert len(batches) == -(-rows // batch_size)


def test_long_files_are_cut_in_windows(tmp_path):
    text = bytes(np.random.default_rng(0).integers(1, 256, 1000, np.uint8))
    (tmp_path / "long.txt").write_bytes(text)
    corpus = find_corpus(tmp_path, heldout=0)
    (batch,) = make_loader(corpus, _BYTES, batch_size=10, sequence_length=100, num_epochs=1)
    order = np.argsort([text.index(bytes(row.tolist())) for row in batch["targets"]])
    assert bytes(batch["targets"][order].ravel().tolist()) == text
    # A window goes on from the byte before it, which is its first input.
    assert bytes(batch["tokens"][order].ravel().tolist()) == b"\0" + text[:-1]


def test_same_seed_same_batches_other_seed_or_epoch_other_order(folder):
    corpus = find_corpus(folder)

    def epoch(seed, number=0):
        loader = make_loader(corpus, _BYTES, batch_size=1, sequence_length=32, seed=seed)
        rows = -(-sum(map(len, corpus.train)) // 32)
        return [next(loader) for _ in range(rows * (number + 1))][rows * number :]

    first = epoch(0)
    for a, b in zip(first, epoch(0), strict=True):
        _equal(a, b)
    for other in (epoch(1), epoch(0, 1)):
        _contains_all(_documents_of(other), [list(span.read()) for span in corpus.train])
        # Neither the rows nor where documents are cut are the same.
        assert not {a["targets"].tobytes() for a in first} <= {b["targets"].tobytes() for b in other}


@pytest.mark.parametrize("parts", [[(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(0, 2), (1, 3)]])
def test_processes_share_out_the_batches_of_one(folder, parts):
    corpus = find_corpus(folder)
    sizes = dict(batch_size=4, sequence_length=50, seed=1, num_epochs=2)
    whole = list(make_loader(corpus, _BYTES, **sizes))
    read = [make_loader(corpus, _BYTES, **sizes, rows=rows) for rows in parts]
    states = []
    for batch, *shares in zip(whole, *read, strict=True):
        for rows, share in zip(parts, shares, strict=True):
            _equal(share, {name: x[list(rows)] for name, x in batch.items()})
        states.append([json.dumps(loader.get_state()) for loader in read])
    assert all(len(set(one)) == 1 for one in states)  # so that any number of processes can go on
    assert len({one[0] for one in states}) == len(whole)


@pytest.mark.parametrize("done", [0, 1, 5, 200])
def test_resuming_gives_the_batches_that_would_have_come(folder, done):
    corpus = find_corpus(folder)
    loader = make_loader(corpus, _BYTES, batch_size=2, sequence_length=64, seed=7)
    for _ in range(done):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = [next(loader) for _ in range(20)]
    resumed = make_loader(find_corpus(folder), _BYTES, batch_size=2, sequence_length=64, seed=7)
    next(resumed)  # a state replaces wherever it was
    resumed.set_state(state)
    for want in expected:
        _equal(next(resumed), want)


def test_orbax_keeps_the_place(folder, tmp_path_factory):
    corpus = find_corpus(folder)
    loader = make_loader(corpus, _BYTES, batch_size=2, sequence_length=64)
    next(loader)
    with ocp.CheckpointManager(tmp_path_factory.mktemp("run")) as manager:
        manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(loader)))
        manager.wait_until_finished()
        expected = next(loader)
        resumed = make_loader(corpus, _BYTES, batch_size=2, sequence_length=64)
        manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    _equal(next(resumed), expected)


def test_a_file_that_shrinks_while_training_is_named(tmp_path):
    (tmp_path / "only.txt").write_bytes(b"a" * 1000)
    loader = make_loader(find_corpus(tmp_path, heldout=0), _BYTES, batch_size=1, sequence_length=100)
    next(loader)
    (tmp_path / "only.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only\.txt, which has changed"):
        [next(loader) for _ in range(20)]


def test_a_place_in_other_data_is_refused(folder):
    corpus = find_corpus(folder)
    state = make_loader(corpus, _BYTES, batch_size=2, sequence_length=64, seed=7).get_state()
    with pytest.raises(ValueError, match="seed was 7 and is 8"):
        make_loader(corpus, _BYTES, batch_size=2, sequence_length=64, seed=8).set_state(state)
    (folder / "more.txt").write_text("more")
    grown = make_loader(find_corpus(folder), _BYTES, batch_size=2, sequence_length=64, seed=7)
    with pytest.raises(ValueError, match="corpus was"):
        grown.set_state(state)


def test_subword_epoch(tmp_path, tokenizer_json):
    texts = ["the cat sat on the mat", "größe ✓", "the dog " * 30, "😀"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(tokenizer_json)
    corpus = find_corpus(tmp_path, heldout=0)
    batches = list(make_loader(corpus, tokenizer, batch_size=2, sequence_length=9, num_epochs=1))
    pieces = _documents_of(batches, tokenizer.separator)
    _contains_all(pieces, [tokenizer.encode(text).tolist() for text in texts])
    assert sum(begins for _, begins in pieces) == len(texts)
    assert sum(batch["bytes"].sum() for batch in batches) == sum(len(text.encode()) for text in texts)


def test_heldout_batches_cover_the_heldout_bytes_in_order(folder):
    corpus = find_corpus(folder, heldout=0.3)
    batches = heldout_batches(corpus, _BYTES, batch_size=3, sequence_length=50)
    ids = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    assert bytes(ids.tolist()) == b"".join(span.read() for span in corpus.heldout)
    assert sum(b["bytes"].sum() for b in batches) == len(ids)
    limited = heldout_batches(corpus, _BYTES, batch_size=3, sequence_length=50, limit_bytes=123)
    covered = limit_bytes(corpus.heldout, 123)
    ids = np.concatenate([b["targets"][b["weights"] > 0] for b in limited])
    assert bytes(ids.tolist()) == b"".join(span.read() for span in covered)
    assert len(ids) == 123


def test_heldout_split_as_a_loader(folder):
    corpus = find_corpus(folder, heldout=0.3)
    batches = list(
        make_loader(corpus, _BYTES, split="heldout", batch_size=2, sequence_length=20, num_epochs=1)
    )
    _contains_all(_documents_of(batches), [list(span.read()) for span in corpus.heldout])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"split": "test"}, "split: got 'test'"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"sequence_length": 0}, "sequence_length: got 0"),
        ({"batch_size": 3, "rows": [2, 3]}, r"rows: got \(2, 3\); expected some of 0 to 2"),
        ({"rows": []}, r"rows: got \(\)"),
        ({"num_epochs": 0}, "num_epochs: got 0"),
        ({"seed": -1}, "seed: got -1"),
        (
            {"sequence_length": 100_000},
            r"sequence_length: got 100000; expected at most \d+, the tokens of the train split",
        ),
    ],
)
def test_loader_errors(folder, changed, words):
    with pytest.raises(ValueError, match=words):
        make_loader(find_corpus(folder), _BYTES, **{"batch_size": 4, "sequence_length": 8, **changed})


def test_nothing_held_out_to_evaluate_on(folder):
    corpus = find_corpus(folder, heldout=0)
    with pytest.raises(ValueError, match="held out"):
        heldout_batches(corpus, _BYTES, batch_size=1, sequence_length=8)
    with pytest.raises(ValueError, match="split: got 'heldout', which is empty"):
        make_loader(corpus, _BYTES, split="heldout", batch_size=1, sequence_length=8)
