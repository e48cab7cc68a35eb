"""Sampling: the full forward's answer, the right distribution, constant memory, few compilations."""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from experiments import generate as generate_module
from experiments.data import load_tokenizer
from experiments.generate import generate, main
from experiments.trainer import sampling
from experiments.trainer.sampling import sample, sample_several, sample_text

_KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def decoder():
    """A small decoder with a state, and sharp logits."""
    block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 2})
    module = frugax.layers.Decoder(vocab_size=61, width=16, blocks=(block,), dtype=jnp.dtype("float32"))
    variables = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))
    return module, jax.tree.map(lambda x: 2 * x, variables)


class Bigram:
    """Logits of the next id by the last one; the state counts tokens. `traces`: what it was traced with."""

    def __init__(self, logits_VV):
        self.logits_VV = jnp.asarray(logits_VV, jnp.float32)
        self.traces = []

    def apply(self, variables, tokens, state=None, segment_ids=None):
        self.traces.append((tokens.shape, state is not None))
        state = jnp.zeros(tokens.shape[:1], jnp.int32) if state is None else state
        return self.logits_VV[tokens], state + tokens.shape[1]


@pytest.mark.parametrize("length", [1, 5, 7, 15])
def test_greedy_is_the_argmax_of_the_full_forward(monkeypatch, decoder, length):
    monkeypatch.setattr(sampling, "_PREFILL", 5)
    module, variables = decoder
    prompt = np.random.default_rng(length).integers(0, 61, length)
    ids = list(sample(module, variables, prompt, steps=15, temperature=0, key=_KEY))
    logits_BTV, _ = jax.jit(module.apply)(variables, jnp.array([[*prompt, *ids]]))
    expected = logits_BTV[0, length - 1 : -1]
    margin = np.diff(np.sort(expected, axis=-1)[:, -2:])
    assert margin.min() > 1e-3, "the test needs logits whose order rounding can't change"
    np.testing.assert_array_equal(ids, expected.argmax(-1))
    assert len(set(ids)) > 1, "an answer without variety tests little"


def test_samples_follow_the_distribution():
    """A frequency of 2,000 draws is off by more than four standard deviations once in 16,000 times."""
    logits = np.array([0.5, -1.0, 2.0, 0.0])
    module, count = Bigram(np.tile(logits, (4, 1))), 2000
    for temperature in (1.0, 2.0):
        ids = list(sample(module, {}, [0], steps=count, temperature=temperature, key=_KEY))
        p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        frequencies = np.bincount(ids, minlength=4) / count
        assert (abs(frequencies - p) < 4 * np.sqrt(p * (1 - p) / count)).all()


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, {2}), (0.5, {2}), (0.55, {2, 0}), (0.85, {2, 0, 3}), (0.96, {0, 1, 2, 3}), (1, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    module = Bigram(np.tile(np.log([0.25, 0.1, 0.5, 0.15]), (4, 1)))
    assert set(sample(module, {}, [0], steps=300, top_p=top_p, key=_KEY)) == kept


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (1, 1, {2}),
        (2, 1, {2, 0}),
        (3, 1, {2, 0, 3}),
        (4, 1, {0, 1, 2, 3}),
        (9, 1, {0, 1, 2, 3}),
        (2, 0.6, {2}),
    ],
)
def test_top_k_keeps_so_many_and_top_p_counts_among_them(top_k, top_p, kept):
    """The first of 0.5 and 0.25 alone has two thirds: enough for 0.6, as it was not among all four."""
    module = Bigram(np.tile(np.log([0.25, 0.1, 0.5, 0.15]), (4, 1)))
    assert set(sample(module, {}, [0], steps=200, top_k=top_k, top_p=top_p, key=_KEY)) == kept


def test_several_answers_at_once():
    """The first is that of one alone, none depends on how many there are, and each ends at its own stop."""
    module = Bigram(np.random.default_rng(0).normal(size=(6, 6)))
    arguments = dict(steps=40, stop=3, key=_KEY)
    five = sample_several(module, {}, [0, 1], samples=5, **arguments)
    assert five[:2] == sample_several(module, {}, [0, 1], samples=2, **arguments)
    assert five[0] == list(sample(module, {}, [0, 1], **arguments))
    assert len({tuple(ids) for ids in five}) == 5
    assert all(3 not in ids for ids in five)
    free = sample_several(module, {}, [0, 1], samples=5, steps=40, key=_KEY)
    assert [ids[: ids.index(3)] for ids in free] == five
    with pytest.raises(ValueError, match="samples: got 0"):
        sample_several(module, {}, [0], samples=0, **arguments)


def test_a_stop_ends_the_answer_and_the_work():
    module = _cycle(b"abc.def", start=ord("x"))
    texts = sample_text(module, {}, load_tokenizer(None), "x", steps=50, temperature=0, stop=".", key=_KEY)
    assert "".join(texts) == "abc"
    with pytest.raises(ValueError, match=r"stop: got '\.\.', 2 tokens; expected one token"):
        sample_text(module, {}, load_tokenizer(None), "x", steps=5, stop="..", key=_KEY)


def test_a_key_decides(decoder):
    module, variables = decoder

    def draw(key):
        return list(sample(module, variables, [1], steps=30, key=jax.random.key(key)))

    assert draw(0) == draw(0) != draw(1)


def test_no_trace_after_the_first_steps():
    module = Bigram(np.zeros((3, 3)))
    ids = sample(module, {}, [0, 1, 2], steps=100, key=_KEY)
    next(ids), next(ids)
    traced = list(module.traces)
    assert traced == [((1, 3), False), ((1, 1), True)]
    assert len(list(ids)) == 98
    assert module.traces == traced


def test_a_long_prompt_takes_two_programs(monkeypatch):
    monkeypatch.setattr(sampling, "_PREFILL", 8)
    module = Bigram(np.zeros((3, 3)))
    assert len(list(sample(module, {}, [0] * 43, steps=2, key=_KEY))) == 2
    assert module.traces == [((1, 3), False), ((1, 8), True), ((1, 1), True)]


def test_memory_is_that_of_the_first_tokens(decoder):
    module, variables = decoder
    ids = sample(module, variables, [1], steps=300, key=_KEY)

    def live() -> tuple[int, int]:
        arrays = jax.live_arrays()
        return len(arrays), sum(array.nbytes for array in arrays)

    list(itertools.islice(ids, 10))
    early = live()
    list(itertools.islice(ids, 250))
    assert live() == early


def test_no_steps_no_ids(decoder):
    assert list(sample(*decoder, [1], steps=0, key=_KEY)) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompt_ids": []}, r"prompt_ids: got float64\[0\].*at least one"),
        ({"prompt_ids": [[1]]}, r"prompt_ids: got int64\[1, 1\]"),
        ({"prompt_ids": [0.5]}, "prompt_ids: got float64"),
        ({"steps": -1}, "steps: got -1"),
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_p": 0}, "top_p: got 0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"top_k": -1}, "top_k: got -1"),
    ],
)
def test_errors_come_with_the_call(changed, words):
    arguments = {"prompt_ids": [1], "steps": 1, "key": _KEY, **changed}
    with pytest.raises(ValueError, match=words):
        sample(Bigram(np.zeros((2, 2))), {}, **arguments)


def _cycle(text: bytes, start: int = 0) -> Bigram:
    """A model of bytes that writes `text`, whose bytes all differ, after the byte `start`."""
    logits_VV = np.zeros((256, 256))
    for before, after in itertools.pairwise([start, *text]):
        logits_VV[before, after] = 1e3
    return Bigram(logits_VV)


def test_text_begins_at_the_separator_and_characters_come_whole():
    text = "é✓z"
    pieces = list(sample_text(_cycle(text.encode()), {}, load_tokenizer(None), "", steps=6, key=_KEY))
    assert pieces == ["é", "✓", "z"]
    module = _cycle(b"bc", start=ord("a"))
    assert "".join(sample_text(module, {}, load_tokenizer(None), "xya", steps=2, key=_KEY)) == "bc"


def test_a_character_cut_short_at_the_end():
    pieces = list(sample_text(_cycle("é✓".encode()), {}, load_tokenizer(None), "", steps=3, key=_KEY))
    assert pieces == ["é", "\ufffd"]


@pytest.fixture
def run(monkeypatch):
    """A run directory's place: a model that writes "efg!" after "d"."""
    asked = []

    def load_run(run_dir, step=None):
        if run_dir == "absent":
            raise FileNotFoundError("absent is no run")
        asked.append((run_dir, step))
        return None, _cycle(b"efg!", start=ord("d")), {}, None, 7

    monkeypatch.setattr(generate_module, "load_run", load_run)
    return asked


def test_generate(run):
    assert "".join(generate("run", "d", step=3, tokens=4, temperature=0)) == "efg!"
    assert run == [("run", 3)]


def test_command_line(run, capsys):
    main(["--run=run", "--prompt=abcd", "--tokens=3", "--top_p=0.5"])
    assert capsys.readouterr().out == "abcdefg\n"


def test_command_line_of_several(run, capsys):
    main(["--run=run", "--prompt=abcd", "--tokens=9", "--top_k=1", "--stop=!", "--samples=3", "--step=best"])
    assert capsys.readouterr().out == "abcdefg\n" * 3
    assert run == [("run", "best")]


def test_a_prompt_that_is_no_text(run, capsys):
    """A shell's $'\\xff' arrives as a surrogate; a byte model reads the byte."""
    typed = os.fsdecode(b"\xffd")
    assert "".join(generate("run", typed, tokens=2, temperature=0)) == "ef"
    main(["--run=run", f"--prompt={typed}", "--tokens=2"])
    assert capsys.readouterr().out == "?def\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--run=absent"], "absent is no run"), (["--run=run", "--temperature=-1"], "temperature: got -1.0")],
)
def test_command_line_errors(run, arguments, words):
    with pytest.raises(SystemExit, match=words):
        main(arguments)


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--prompt" in capsys.readouterr().out
