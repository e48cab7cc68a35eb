"""The data pipeline: every byte once an epoch, no target across documents, exact resumption, errors."""

import json
import pathlib

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers

from experiments.data import Span, find_corpus, heldout_batches, limit_bytes, load_tokenizer, make_loader

_BYTES = load_tokenizer(None)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """40 documents of 1 to 299 random bytes in two folders, and what is no text."""
    random = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / ("deep/er" if number % 2 else ".") / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.integers(1, 256, random.integers(1, 300), np.uint8).tobytes())
    (tmp_path / "empty.txt").touch()
    (tmp_path / "image.bin").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory) -> str:
    """A byte-level BPE, trained here: the layout of GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def _names(spans) -> set[str]:
    return {pathlib.Path(span.path).name for span in spans}


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


# Which files


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


def test_split_does_not_depend_on_where_the_corpus_lies_or_on_other_files(folder, tmp_path_factory):
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
    assert _names(find_corpus(elsewhere, heldout=0.3).heldout) - {"new.txt"} == _names(corpus.heldout)
    assert find_corpus(elsewhere, heldout=0.3).digest != corpus.digest


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
        (lambda f: find_corpus(f / "absent"), FileNotFoundError, "absent.*does not exist"),
        (lambda f: find_corpus(f / "*.md"), FileNotFoundError, r"\*\.md.*matches no file"),
        (lambda f: find_corpus(f / "none"), ValueError, "none.*holds no text"),
        (lambda f: find_corpus(f / "empty.txt"), ValueError, "empty.txt.*is empty"),
        (lambda f: find_corpus(f / "empty*"), ValueError, "all of its 2 files are empty"),
        (lambda f: find_corpus(_single(f / "one.txt", b"1")), ValueError, "one.txt.*1 bytes: too few"),
        (lambda f: find_corpus(f, heldout=1.0), ValueError, r"heldout.*\[0, 1\)"),
        (lambda f: limit_bytes((), 0), ValueError, "limit=0"),
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
    with pytest.raises(ValueError, match=f"{path.name} has changed"):
        corpus.train[0].read()


# As which ids


def test_bytes_and_back():
    text = "def größe():\n\treturn '✓'\n"
    assert _BYTES.encode(text).tolist() == list(text.encode())
    assert _BYTES.encode(text).dtype == np.int32
    assert _BYTES.decode(_BYTES.encode(text)) == text.encode()


@pytest.mark.parametrize("subword", [False, True])
def test_stream_joins_characters_split_over_ids(tokenizer_json, subword):
    tokenizer = load_tokenizer(tokenizer_json) if subword else _BYTES
    text = "a ✓ größe 😀, the cat"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text) - 6  # several ids to a character: the tokenizer has not seen these
    stream = tokenizer.stream()
    pieces = [stream.push(int(token)) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert tokenizer.decode(ids) == text.encode()


def test_bytes_that_are_no_text_stream_as_replacements():
    stream = _BYTES.stream()
    assert "".join(stream.push(b) for b in b"a\xff\xe2\x9c") + stream.flush() == "a\ufffd\ufffd"


def test_subwords_that_make_up_no_character_do_not_wait_forever(tokenizer_json):
    tokenizer = load_tokenizer(tokenizer_json)
    lead = int(tokenizer.encode("✓")[0])
    stream = tokenizer.stream()
    text = "".join(stream.push(lead) for _ in range(40))
    assert set(text) == {"\ufffd"}
    assert len(text) >= 36
    stream.push(int(tokenizer.encode("the")[0]))
    rest = [stream.push(int(token)) for token in tokenizer.encode(" ✓ the cat")]
    assert "".join(rest).endswith("✓ the cat")
    stream.push(lead)
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_subword_separator(tokenizer_json, tmp_path):
    tokenizer = load_tokenizer(tokenizer_json)
    theirs = tokenizers.Tokenizer.from_file(tokenizer_json)
    assert tokenizer.vocab_size == theirs.get_vocab_size()
    assert tokenizer.separator == theirs.token_to_id("<|endoftext|>")
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 4}, unk_token="a"))
    bare.save(str(tmp_path / "bare.json"))
    bare = load_tokenizer(str(tmp_path / "bare.json"))
    assert (bare.separator, bare.vocab_size) == (5, 6)  # one more id than the largest


def test_a_separator_spelled_out_is_text(tokenizer_json):
    tokenizer = load_tokenizer(tokenizer_json)
    ids = tokenizer.encode("the <|endoftext|> cat")
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == b"the <|endoftext|> cat"


@pytest.mark.parametrize("text", ["the cat sat", "größe ✓ 😀 the", "", "😀", "a\r\nb\t\n "])
def test_byte_counts_of_subwords(tokenizer_json, text):
    ((ids, ends),) = load_tokenizer(tokenizer_json).encode_with_ends([text])
    assert len(ids) == len(ends)
    if text:
        assert ends[-1] == len(text.encode())
        assert (np.diff(ends) >= 0).all()
    tokenizer = load_tokenizer(tokenizer_json)
    for count, end in enumerate(ends, 1):
        if ends[count - 1 : count + 1].tolist().count(end) == 1:  # not in the middle of a character
            assert tokenizer.decode(ids[:count]) == text.encode()[:end]


def test_bytes_that_are_not_utf8_count_as_they_are(tokenizer_json):
    data = b"caf\xe9 the cat \xff\xff"
    ((_, ends),) = load_tokenizer(tokenizer_json).encode_with_ends([data])
    assert ends[-1] == len(data)
    assert (np.diff(ends) >= 0).all()


@pytest.mark.parametrize("data", [b"", b"{", b'{"model": 3}', b"\xff\xfe"])
def test_corrupt_tokenizer(tmp_path, data):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer=.*tokenizer.json"):
        load_tokenizer(str(path))


def test_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        load_tokenizer(str(tmp_path / "absent.json"))


# In which batches


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 1), (3, 7), (4, 64), (2, 1000)])
def test_an_epoch_has_every_byte_once_as_the_target_of_the_one_before_it(folder, batch_size, seq_len):
    corpus = find_corpus(folder)
    batches = list(make_loader(corpus, _BYTES, batch_size=batch_size, seq_len=seq_len, seed=3, num_epochs=1))
    for batch in batches:
        assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
            "tokens": ((batch_size, seq_len), "int32"),
            "targets": ((batch_size, seq_len), "int32"),
            "segment_ids": ((batch_size, seq_len), "int32"),
            "weights": ((batch_size, seq_len), "float32"),
            "bytes": ((batch_size,), "int32"),
        }
        np.testing.assert_array_equal(batch["bytes"], batch["weights"].sum(1))
    pieces = _documents_of(batches)
    if seq_len > 1:  # pieces of one byte fit anywhere
        _contains_all(pieces, [list(span.read()) for span in corpus.train])
    counts = np.bincount([b for piece, _ in pieces for b in piece], minlength=256)
    np.testing.assert_array_equal(
        counts, np.bincount(list(b"".join(span.read() for span in corpus.train)), minlength=256)
    )
    # No document has a byte 0, so an input of 0 is a beginning.
    assert sum(begins for _, begins in pieces) == len(corpus.train)
    # Dense: only the epoch's last row has padding, and then rows that fill the last batch.
    rows = -(-sum(map(len, corpus.train)) // seq_len)
    assert sum(batch["weights"].any(1).sum() for batch in batches) == rows
    assert len(batches) == -(-rows // batch_size)


def test_long_files_are_cut_in_windows(tmp_path):
    text = bytes(np.random.default_rng(0).integers(1, 256, 1000, np.uint8))
    (tmp_path / "long.txt").write_bytes(text)
    corpus = find_corpus(tmp_path, heldout=0)
    (batch,) = make_loader(corpus, _BYTES, batch_size=10, seq_len=100, num_epochs=1)
    order = np.argsort([text.index(bytes(row.tolist())) for row in batch["targets"]])
    assert bytes(batch["targets"][order].ravel().tolist()) == text
    # A window goes on from the byte before it, which is its first input.
    assert bytes(batch["tokens"][order].ravel().tolist()) == b"\0" + text[:-1]


def test_same_seed_same_batches_other_seed_or_epoch_other_order(folder):
    corpus = find_corpus(folder)

    def epoch(seed, number=0):
        loader = make_loader(corpus, _BYTES, batch_size=1, seq_len=32, seed=seed)
        rows = -(-sum(map(len, corpus.train)) // 32)
        return [next(loader) for _ in range(rows * (number + 1))][rows * number :]

    first = epoch(0)
    for a, b in zip(first, epoch(0), strict=True):
        _equal(a, b)
    for other in (epoch(1), epoch(0, 1)):
        _contains_all(_documents_of(other), [list(span.read()) for span in corpus.train])
        # Neither the rows nor where documents are cut are the same.
        assert not {a["targets"].tobytes() for a in first} <= {b["targets"].tobytes() for b in other}


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_out_the_batches_of_one(folder, process_count):
    corpus = find_corpus(folder)
    sizes = dict(batch_size=4, seq_len=50, seed=1, num_epochs=2)
    whole = list(make_loader(corpus, _BYTES, **sizes))
    parts = [
        list(make_loader(corpus, _BYTES, **sizes, process_index=i, process_count=process_count))
        for i in range(process_count)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for batch, *shares in zip(whole, *parts, strict=True):
        assert all(len(share["tokens"]) == 4 // process_count for share in shares)
        _equal({name: np.concatenate([share[name] for share in shares]) for name in batch}, batch)


@pytest.mark.parametrize("done", [0, 1, 5, 200])
def test_resuming_gives_the_batches_that_would_have_come(folder, done):
    corpus = find_corpus(folder)
    loader = make_loader(corpus, _BYTES, batch_size=2, seq_len=64, seed=7)
    for _ in range(done):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = [next(loader) for _ in range(20)]
    resumed = make_loader(find_corpus(folder), _BYTES, batch_size=2, seq_len=64, seed=7)
    next(resumed)  # a state replaces wherever it was
    resumed.set_state(state)
    for want in expected:
        _equal(next(resumed), want)


def test_orbax_keeps_the_place(folder, tmp_path_factory):
    corpus = find_corpus(folder)
    loader = make_loader(corpus, _BYTES, batch_size=2, seq_len=64)
    next(loader)
    with ocp.CheckpointManager(tmp_path_factory.mktemp("run")) as manager:
        manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(loader)))
        manager.wait_until_finished()
        expected = next(loader)
        resumed = make_loader(corpus, _BYTES, batch_size=2, seq_len=64)
        manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    _equal(next(resumed), expected)


def test_a_file_that_shrinks_while_training_is_named(tmp_path):
    (tmp_path / "only.txt").write_bytes(b"a" * 1000)
    loader = make_loader(find_corpus(tmp_path, heldout=0), _BYTES, batch_size=1, seq_len=100)
    next(loader)
    (tmp_path / "only.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only\.txt has changed"):
        [next(loader) for _ in range(20)]


def test_a_place_in_other_data_is_refused(folder):
    corpus = find_corpus(folder)
    state = make_loader(corpus, _BYTES, batch_size=2, seq_len=64, seed=7).get_state()
    with pytest.raises(ValueError, match="seed was 7 and is 8"):
        make_loader(corpus, _BYTES, batch_size=2, seq_len=64, seed=8).set_state(state)
    (folder / "more.txt").write_text("more")
    grown = make_loader(find_corpus(folder), _BYTES, batch_size=2, seq_len=64, seed=7)
    with pytest.raises(ValueError, match="corpus was"):
        grown.set_state(state)


def test_subword_epoch(tmp_path, tokenizer_json):
    texts = ["the cat sat on the mat", "größe ✓", "the dog " * 30, "😀"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(tokenizer_json)
    corpus = find_corpus(tmp_path, heldout=0)
    batches = list(make_loader(corpus, tokenizer, batch_size=2, seq_len=9, num_epochs=1))
    pieces = _documents_of(batches, tokenizer.separator)
    _contains_all(pieces, [tokenizer.encode(text).tolist() for text in texts])
    assert sum(begins for _, begins in pieces) == len(texts)
    assert sum(batch["bytes"].sum() for batch in batches) == sum(len(text.encode()) for text in texts)


def test_heldout_batches_cover_the_heldout_bytes_in_order(folder):
    corpus = find_corpus(folder, heldout=0.3)
    batches = heldout_batches(corpus, _BYTES, batch_size=3, seq_len=50)
    ids = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    assert bytes(ids.tolist()) == b"".join(span.read() for span in corpus.heldout)
    assert sum(b["bytes"].sum() for b in batches) == len(ids)
    limited = heldout_batches(corpus, _BYTES, batch_size=3, seq_len=50, limit_bytes=123)
    covered = limit_bytes(corpus.heldout, 123)
    ids = np.concatenate([b["targets"][b["weights"] > 0] for b in limited])
    assert bytes(ids.tolist()) == b"".join(span.read() for span in covered)
    assert len(ids) == 123


def test_heldout_split_as_a_loader(folder):
    corpus = find_corpus(folder, heldout=0.3)
    batches = list(make_loader(corpus, _BYTES, split="heldout", batch_size=2, seq_len=20, num_epochs=1))
    _contains_all(_documents_of(batches), [list(span.read()) for span in corpus.heldout])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"split": "test"}, "split='test'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"batch_size": 3, "process_count": 2}, "batch_size=3 must be a multiple of process_count=2"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seq_len": 100_000}, "seq_len=100000 is longer than the train split"),
    ],
)
def test_loader_errors(folder, changed, words):
    with pytest.raises(ValueError, match=words):
        make_loader(find_corpus(folder), _BYTES, **{"batch_size": 4, "seq_len": 8, **changed})


def test_nothing_held_out_to_evaluate_on(folder):
    corpus = find_corpus(folder, heldout=0)
    with pytest.raises(ValueError, match="held out"):
        heldout_batches(corpus, _BYTES, batch_size=1, seq_len=8)
    with pytest.raises(ValueError, match=r"heldout split .* is empty"):
        make_loader(corpus, _BYTES, split="heldout", batch_size=1, seq_len=8)
