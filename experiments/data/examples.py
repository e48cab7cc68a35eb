"""Labelled examples: scikit-learn's digits, spoken vowels that ship with aeon, and synthetic tasks.

Each is a `Task` of arrays: inputs [n, ...], labels and weights [n] or, where each token has one, [n, T].
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Examples(NamedTuple):
    """Inputs, the class of each, and how much it counts: 0 where there is nothing to predict."""

    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class Task(NamedTuple):
    """Examples to train on and to test on, the number of classes, and tests of other lengths by name."""

    train: Examples
    held_out: Examples
    classes: int
    lengths: dict[str, Examples] | None = None


def digits() -> Task:
    """scikit-learn's 1,797 images [8, 8, 1] of digits, every fifth held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images[..., None] / 8 - 1).astype(np.float32)
    labels = data.target.astype(np.int32)
    all_of_it = Examples(images, labels, np.ones(len(labels), np.float32))
    held = np.arange(len(labels)) % 5 == 4
    return Task(Examples(*(x[~held] for x in all_of_it)), Examples(*(x[held] for x in all_of_it)), 10)


def vowels() -> Task:
    """Nine speakers' vowels, 7 to 29 frames of 12 cepstral coefficients: 270 to train on, 370 held out.

    The label stands at an utterance's last frame; what pads it to 29 frames has weight 0.

    The files of aeon are read and none of its code, so that what it depends on (numba, pandas) can stay away;
    sktime ships the same ones.

    Raises:
      ValueError: neither package is installed.

    Source: Kudo, Toyama and Shimbo 1999, UCI's "Japanese Vowels", as aeon and sktime ship it.
    """
    packages = [importlib.util.find_spec(name) for name in ("aeon", "sktime")]
    found = [Path(p.origin).parent for p in packages if p is not None and p.origin is not None]
    if not found:
        raise ValueError("task: got vowels without their data; expected aeon: pip install --no-deps aeon")
    folder = found[0] / "datasets/data/JapaneseVowels"
    train, held_out = (_read_ts(folder / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST"))
    return Task(train, held_out, 9)


def _read_ts(path: Path, longest: int = 29) -> Examples:
    lines = path.read_text(encoding="utf-8").partition("@data\n")[2].split()
    inputs = np.zeros((len(lines), longest, 12), np.float32)
    labels, weights = np.zeros((len(lines), longest), np.int32), np.zeros((len(lines), longest), np.float32)
    for i, line in enumerate(lines):
        *channels, label = line.split(":")
        signal = np.array([[float(x) for x in channel.split(",")] for channel in channels]).T
        inputs[i, : len(signal)] = signal
        labels[i, len(signal) - 1], weights[i, len(signal) - 1] = int(label) - 1, 1
    return Examples(inputs, labels, weights)


def selective_copying(train: int, held_out: int, length: int, copied: int, symbols: int, seed: int) -> Task:
    """Tokens strewn at random over `length` noise tokens, to be copied in their order at `copied` marks.

    Token 0 is noise, 1 the mark, the others the symbols to copy.

    Source: Mamba (arXiv 2312.00752), section 4.1.1.
    """

    def make(n, rng):
        tokens = np.zeros((n, length + copied), np.int32)
        labels = np.zeros_like(tokens)
        places = np.sort(rng.permuted(np.tile(np.arange(length), (n, 1)), axis=1)[:, :copied], axis=1)
        values = rng.integers(2, 2 + symbols, (n, copied), np.int32)
        np.put_along_axis(tokens, places, values, axis=1)
        tokens[:, length:], labels[:, length:] = 1, values
        weights = np.broadcast_to((np.arange(length + copied) >= length).astype(np.float32), tokens.shape)
        return Examples(tokens, labels, weights)

    rng = np.random.default_rng(seed)
    return Task(make(train, rng), make(held_out, rng), symbols + 2)


def induction_heads(
    train: int, held_out: int, length: int, symbols: int, seed: int, longer: Sequence[int] = ()
) -> Task:
    """Random tokens; the one that followed the special token must come after it at the end again.

    `longer` are lengths never trained on, each with as many examples as are held out.

    Source: Mamba (arXiv 2312.00752), section 4.1.2.
    """

    def make(n, length):
        tokens = rng.integers(1, 1 + symbols, (n, length), np.int32)
        place = rng.integers(0, length - 2, n)
        tokens[np.arange(n), place] = tokens[:, -1] = 0
        labels, weights = np.zeros_like(tokens), np.zeros((n, length), np.float32)
        labels[:, -1], weights[:, -1] = tokens[np.arange(n), place + 1], 1
        return Examples(tokens, labels, weights)

    rng = np.random.default_rng(seed)
    trained, held = make(train, length), make(held_out, length)
    return Task(trained, held, symbols + 1, {str(n): make(held_out, n) for n in longer})


def parity(train: int, held_out: int, length: int, seed: int, longer: Sequence[int] = ()) -> Task:
    """Random bits, each labelled with the parity of the ones so far.

    `longer` are lengths never trained on, each with as many examples as are held out; what counts there are
    the tokens beyond `length`.

    Source: the state tracking of xLSTM (arXiv 2405.04517) and FlashRNN (2412.07752).
    """

    def make(n, length, counted_from=0):
        bits = rng.integers(0, 2, (n, length), np.int32)
        weights = np.broadcast_to((np.arange(length) >= counted_from).astype(np.float32), bits.shape)
        return Examples(bits, np.cumsum(bits, axis=1, dtype=np.int32) % 2, weights)

    rng = np.random.default_rng(seed)
    trained, held = make(train, length), make(held_out, length)
    return Task(trained, held, 2, {str(n): make(held_out, n, length) for n in longer})
