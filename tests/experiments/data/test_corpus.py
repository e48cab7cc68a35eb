"""The files of a corpus, those of them that are held out, and the errors of a path without any."""

import itertools
import json
import pathlib

import pytest

from experiments.data import Span, find_corpus, limit_bytes


def _names(spans) -> set[str]:
    return {pathlib.Path(span.path).name for span in spans}


def test_default_corpus_is_this_interpreters_library():
    corpus = find_corpus(None)
    names = [pathlib.Path(name) for name in corpus.files]
    assert all(name.suffix == ".py" and "site-packages" not in name.parts for name in names)
    assert pathlib.Path(json.__file__) in names
    assert sum(map(len, corpus.train)) > 5e6
    assert corpus == find_corpus(None)


def test_folder_takes_text_below_it_and_nothing_else(folder):
    corpus = find_corpus(folder)
    expected = {f"{number:02d}.txt" for number in range(40)}
    assert _names(corpus.train) | _names(corpus.heldout) == expected
    assert not _names(corpus.train) & _names(corpus.heldout)
    assert len(corpus.heldout) >= 1
    assert all(len(span) == pathlib.Path(span.path).stat().st_size for span in corpus.train + corpus.heldout)


def test_glob(folder):
    assert _names(find_corpus(f"{folder}/0?.txt", heldout=0).train) == {f"0{n}.txt" for n in (0, 2, 4, 6, 8)}
    deep = find_corpus(f"{folder}/**/*.txt", heldout=0)
    assert len(deep.train) == 40


def test_split_does_not_depend_on_where_the_corpus_lies(folder, tmp_path_factory):
    corpus = find_corpus(folder, heldout=0.3)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    elsewhere.mkdir()
    for span in corpus.train + corpus.heldout:
        target = elsewhere / pathlib.Path(span.path).relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(span.read())
    moved = find_corpus(elsewhere, heldout=0.3)
    assert _names(moved.heldout) == _names(corpus.heldout)
    assert moved.digest == corpus.digest
    (elsewhere / "new.txt").write_text("new")
    assert find_corpus(elsewhere, heldout=0.3).digest != corpus.digest


def test_every_part_of_a_corpus_gives_its_share(folder):
    corpus = find_corpus(folder, heldout=0.25)
    ranks = sorted(corpus.files.index(span.path) for span in corpus.heldout)
    assert [b - a for a, b in itertools.pairwise(ranks)] == [4] * 9


def test_share_of_files_held_out():
    corpus = find_corpus(None, heldout=0.2)
    assert 0.15 < len(corpus.heldout) / len(corpus.files) < 0.25


@pytest.mark.parametrize("heldout", [0.001, 0.5, 0.999])
def test_two_files_give_one_to_each_split(tmp_path, heldout):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    corpus = find_corpus(tmp_path, heldout=heldout)
    assert len(corpus.train) == len(corpus.heldout) == 1


def test_single_file_holds_its_tail_out_from_a_line_on(tmp_path):
    path = tmp_path / "book.txt"
    lines = [f"line {number}: äöü\n".encode() for number in range(1000)]
    path.write_bytes(b"".join(lines))
    corpus = find_corpus(path, heldout=0.1)
    (train,), (kept,) = corpus.train, corpus.heldout
    assert train.read() + kept.read() == path.read_bytes()
    assert kept.read().startswith(b"line ")
    assert 0.09 < len(kept) / (len(train) + len(kept)) < 0.11
    assert "tail" in str(corpus)


def test_single_long_line_is_cut_all_the_same(tmp_path):
    (tmp_path / "line.txt").write_bytes(b"a" * 99 + b"\n")
    corpus = find_corpus(tmp_path / "line.txt", heldout=0.1)
    assert [len(corpus.train[0]), len(corpus.heldout[0])] == [90, 10]


def test_limit_bytes_cuts_the_last_document():
    spans = (Span("a", 0, 5), Span("b", 2, 9), Span("c", 0, 9))
    assert limit_bytes(spans, 8) == (Span("a", 0, 5), Span("b", 2, 5))
    assert limit_bytes(spans, 5) == spans[:1]
    assert limit_bytes(spans, None) == spans
    assert limit_bytes(spans, 1000) == spans


def _single(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda f: find_corpus(f / "absent"), FileNotFoundError, "absent.*not there"),
        (lambda f: find_corpus(f / "*.md"), FileNotFoundError, r"\*\.md.*matches no file"),
        (lambda f: find_corpus(f / "none"), ValueError, "none.*holds no text"),
        (lambda f: find_corpus(f / "empty.txt"), ValueError, "empty.txt.*an empty file"),
        (lambda f: find_corpus(f / "empty*"), ValueError, "with 2 files, all empty"),
        (
            lambda f: find_corpus(_single(f / "one.txt", b"1")),
            ValueError,
            "one.txt. of 1 bytes; expected enough",
        ),
        (lambda f: find_corpus(f, heldout=1.0), ValueError, r"heldout: got 1"),
        (lambda f: limit_bytes((), 0), ValueError, "limit: got 0"),
    ],
)
def test_corpus_errors(tmp_path, make, error, words):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "image.bin").write_bytes(b"\0\1\2")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty too").touch()
    with pytest.raises(error, match=words):
        make(tmp_path)


def test_a_file_that_shrank_is_named(folder):
    corpus = find_corpus(folder, heldout=0)
    path = pathlib.Path(corpus.train[0].path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path.name}, which has changed"):
        corpus.train[0].read()
