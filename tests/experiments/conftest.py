"""Fixtures of the data: a folder of documents, and a tokenizer."""

import pathlib

import numpy as np
import pytest
import tokenizers


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
