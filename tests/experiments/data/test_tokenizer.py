"""Text to ids and back: exactly, also one id at a time, and with every byte counted."""

import numpy as np
import pytest
import tokenizers

from experiments.data import load_tokenizer, lost_share

_BYTES = load_tokenizer(None)


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


def test_a_stream_goes_on_from_a_prompt(tmp_path):
    """SentencePiece's first space and WordPiece's joins show only beside the ids before."""
    metaspace = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"▁the": 0, "▁quick": 1, "▁brown": 2, "▁fox": 3, "?": 4}, unk_token="?")
    )
    metaspace.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    metaspace.decoder = tokenizers.decoders.Metaspace()
    pieces = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"play": 0, "##ing": 1, "on": 2, "?": 3}, unk_token="?")
    )
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pieces.decoder = tokenizers.decoders.WordPiece()
    for theirs, prompt, rest, text in (
        (metaspace, "the quick", [2, 3], " brown fox"),
        (metaspace, "", [0, 1], "the quick"),
        (pieces, "play", [1, 2], "ing on"),
        (pieces, "playing", [2, 0], " on play"),
    ):
        theirs.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
        stream = tokenizer.stream(tokenizer.encode(prompt).tolist())
        assert "".join([stream.push(token) for token in rest]) + stream.flush() == text


def test_the_share_that_a_tokenizer_loses(tokenizer_json, tmp_path):
    lines = ["the cat", "größe ✓", "  the dog"]
    document = "\n".join(lines).encode()
    assert lost_share(_BYTES, [document]) == lost_share(load_tokenizer(tokenizer_json), [document]) == 0
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    words = load_tokenizer(str(tmp_path / "words.json"))
    assert lost_share(words, [document]) == pytest.approx(1 - len("the cat\n") / len(document))
    assert lost_share(words, [b"all unknown\n" * 3]) == 1
    assert lost_share(words, []) == 0


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
    with pytest.raises(ValueError, match=r"tokenizer: got .*tokenizer.json"):
        load_tokenizer(str(path))


def test_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        load_tokenizer(str(tmp_path / "absent.json"))
