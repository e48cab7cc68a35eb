"""Text to ids and back: bytes by default, or a Hugging Face tokenizer.json."""

import codecs
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TextStream(Protocol):
    """Text from one id at a time: characters that are split over ids come out when they are whole."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class ByteTokenizer:
    """A token is a byte. Byte 0, which text does not contain, also stands before each document.

    Example:
        >>> ByteTokenizer().encode("hé").tolist()
        [104, 195, 169]
    """

    vocab_size = 256
    separator = 0

    def encode(self, text: bytes | str) -> np.ndarray:
        """ids [n] int32 of `text`."""
        return np.frombuffer(_bytes_of(text), np.uint8).astype(np.int32)

    def decode(self, ids) -> bytes:
        """The bytes that ids stand for."""
        return np.asarray(ids).astype(np.uint8).tobytes()

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        """Text from one id at a time, whatever came before; bytes that are not UTF-8 come out as U+FFFD."""
        return _ByteStream()


class _ByteStream:
    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


# What the common tokenizer families call the token that begins or separates documents.
_SEPARATORS = (
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<bos>",
    "<s>",
    "</s>",
    "<eos>",
    "[SEP]",
)


class SubwordTokenizer:
    """A Hugging Face tokenizer. A tokenizer without a separator gets one more id than its vocabulary."""

    def __init__(self, path: str):
        # Imported here: runs on bytes, the default, do without the package.
        import tokenizers

        self.path = path
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"tokenizer: got {path!r}, which is no file; expected a Hugging Face tokenizer.json, or None"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"tokenizer: got {path!r}; expected a Hugging Face tokenizer.json ({error})"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A special token that a document spells out is text: the separator stays an input only.
        self._tokenizer.encode_special_tokens = True
        # Ids may have gaps: what an embedding needs is the largest id.
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise ValueError(f"tokenizer: got {path!r} with an empty vocabulary; expected tokens in it")
        self.vocab_size = max(ids.values()) + 1
        named = [ids[name] for name in _SEPARATORS if name in ids]
        self.separator = named[0] if named else self.vocab_size
        self.vocab_size = max(self.vocab_size, self.separator + 1)

    def encode(self, text: bytes | str) -> np.ndarray:
        """ids [n] int32 of `text`; bytes that are not UTF-8 are read as U+FFFD."""
        return self.encode_with_ends([text])[0][0]

    def encode_with_ends(self, texts: Sequence[bytes | str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text, ids [n] and, of each id, how many bytes of the text end with it ([n])."""
        data = [_bytes_of(text) for text in texts]
        strings = [text.decode(errors="replace") for text in data]
        encodings = self._tokenizer.encode_batch(strings, add_special_tokens=False)
        return [
            (np.array(encoding.ids, np.int32), _byte_ends(encoding.offsets, string, len(text)))
            for encoding, string, text in zip(encodings, strings, data, strict=True)
        ]

    def decode(self, ids) -> bytes:
        """The bytes that ids stand for."""
        ids = [int(token) for token in np.asarray(ids).ravel()]
        return self._tokenizer.decode(ids, skip_special_tokens=True).encode()

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        """Text from one id at a time, in constant memory.

        Args:
            before: the ids that the stream goes on from. A first id's space, or that it joins the word before
                it, shows only beside those.
        """
        return _SubwordStream(self._tokenizer, before)


_REMEMBERED = 8  # ids of a prompt: more than make up a character


class _SubwordStream:
    """Decodes the last few ids again with each new one: what an id adds depends on those before it."""

    def __init__(self, tokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._shown = [int(token) for token in before[-_REMEMBERED:]]
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        self._waiting.append(int(token))
        # A character has four bytes at most: what is still not whole after four ids never will be.
        if len(self._waiting) < 4 and self._text().endswith("\ufffd"):
            return ""
        return self.flush()

    def flush(self) -> str:
        text = self._text()
        self._shown, self._waiting = self._waiting or self._shown, []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._waiting)[len(before) :]


# Both have vocab_size, and separator: the id that stands before the first token of a document. It is an input
# only, never a target.
Tokenizer = ByteTokenizer | SubwordTokenizer


def load_tokenizer(path: str | None = None) -> Tokenizer:
    """Bytes for None, or the Hugging Face tokenizer.json at `path`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no tokenizer.

    Example:
        >>> load_tokenizer(None).vocab_size
        256
    """
    return ByteTokenizer() if path is None else SubwordTokenizer(os.path.expanduser(path))


def _bytes_of(text: bytes | str) -> bytes:
    """UTF-8; what a command line could not decode is again the bytes that were typed."""
    return text.encode(errors="surrogateescape") if isinstance(text, str) else text


def lost_share(tokenizer: Tokenizer, documents: Sequence[bytes]) -> float:
    """The share of bytes in lines that a tokenizer can't give back, but for white space around a line.

    Bits per byte tell nothing about text that a model's tokens don't hold: where each word is the one unknown
    token, they are 0.

    Example:
        >>> lost_share(load_tokenizer(None), [b"any bytes"])
        0.0
    """
    if isinstance(tokenizer, ByteTokenizer):
        return 0.0
    lines = [line for data in documents for line in data.splitlines(keepends=True)]
    lost = 0
    for line in lines:
        back = tokenizer.decode(tokenizer.encode(line))
        lost += len(line) * (back.strip() != line.strip())
    return lost / max(sum(map(len, lines)), 1)


def _byte_ends(offsets: list[tuple[int, int]], string: str, num_bytes: int) -> np.ndarray:
    """Character offsets of tokens as byte offsets of their ends; the last token ends where the text does."""
    if not offsets:
        return np.zeros(0, np.int64)
    ends = np.array([end for _, end in offsets])
    points = np.frombuffer(string.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    byte_ends = np.concatenate([[0], np.cumsum(sizes)])[ends]
    # A byte that was replaced by U+FFFD counts three here and one in the file.
    byte_ends = np.minimum(np.maximum.accumulate(byte_ends), num_bytes)
    byte_ends[-1] = num_bytes
    return byte_ends
