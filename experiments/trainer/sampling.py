"""Sampling from a language model token by token, in constant memory."""

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.data import Tokenizer

_PREFILL = 128  # prompt tokens that go through the model at once


def sample(
    module: Any,
    variables: Any,
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    steps: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: int | None = None,
    key: Array,
) -> Iterator[int]:
    """Continue a prompt, one id at a time, with as much memory for the last as for the first.

    The prompt goes through in chunks; from then on one compiled step with T == 1 replaces the state in place.

    Args:
        module: a language model, `module.apply(variables, tokens, state=None, segment_ids=None) -> (logits,
            state)`, hashable. Its state keeps its shapes from call to call.
        variables: its variables.
        prompt_ids: at least one id; a document starts with the tokenizer's separator.
        steps: how many ids to give at most.
        temperature: divides the logits; 0 takes the likeliest id each time.
        top_p: samples only from the likeliest ids that together have this probability, in (0, 1].
        top_k: samples only from so many of the likeliest ids; 0 from all. top_p then counts among those.
        stop: the id that ends the answer, without being part of it; None for none.
        key: a `jax.random.key`. The same key gives the same ids.

    Returns:
        An iterator of at most `steps` ids.

    Raises:
        ValueError: an argument is out of range.

    Source: Holtzman et al., 2020, arXiv 1904.09751, for top_p; Fan et al., 2018, arXiv 1805.04833, for top_k.
    """
    options = _options(steps, temperature, top_p, top_k, stop)
    rows = _sample(module, variables, _prompt(prompt_ids), options, key[None])
    return (int(ids[0]) for ids in rows)


def sample_several(
    module: Any,
    variables: Any,
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    samples: int,
    steps: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: int | None = None,
    key: Array,
) -> list[list[int]]:
    """Continue one prompt in several ways at once.

    Args:
        module: as in `sample`.
        variables: as in `sample`.
        prompt_ids: as in `sample`.
        samples: how many answers. The first is that of `sample`, and none depends on how many there are.
        steps: as in `sample`.
        temperature: as in `sample`.
        top_p: as in `sample`.
        top_k: as in `sample`.
        stop: as in `sample`; each answer ends at its own.
        key: as in `sample`.

    Returns:
        The ids of each answer.

    Raises:
        ValueError: an argument is out of range.
    """
    if operator.index(samples) < 1:
        raise ValueError(f"samples: got {samples}; expected at least 1")
    options = _options(steps, temperature, top_p, top_k, stop)
    # Every answer has a key of its own; the first has the one that `sample` uses.
    others = [jax.random.fold_in(key, 2**32 - number) for number in range(1, samples)]
    keys = jnp.stack([key, *others])
    rows = list(_sample(module, variables, _prompt(prompt_ids), options, keys))
    answers = np.array(rows, np.int32).reshape(len(rows), samples).T.tolist()
    return [ids[: ids.index(stop)] if stop in ids else ids for ids in answers]


class _Options(NamedTuple):
    """Arguments of `sample`, checked."""

    steps: int
    temperature: float
    top_p: float
    top_k: int
    stop: int | None


def _options(steps, temperature, top_p, top_k, stop) -> _Options:
    steps, top_k = operator.index(steps), operator.index(top_k)
    if steps < 0:
        raise ValueError(f"steps: got {steps}; expected at least 0")
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature: got {temperature}; expected 0 (the likeliest id) or a positive number"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}; expected above 0 and at most 1")
    if top_k < 0:
        raise ValueError(f"top_k: got {top_k}; expected at least 1, or 0 for all")
    return _Options(steps, float(temperature), float(top_p), top_k, stop)


def _prompt(prompt_ids) -> np.ndarray:
    prompt = np.asarray(prompt_ids)
    if prompt.ndim != 1 or not len(prompt) or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(
            f"prompt_ids: got {prompt.dtype}{list(prompt.shape)}; expected [n] integer ids, at least one"
        )
    return prompt.astype(np.int32)


def sample_text(
    module: Any, variables: Any, tokenizer: Tokenizer, prompt: str, **options: Any
) -> Iterator[str]:
    """Continue a document that starts with `prompt`, piece by piece: `sample` from and to text.

    Args:
        module: as in `sample`.
        variables: as in `sample`.
        tokenizer: from `experiments.data.load_tokenizer`.
        prompt: how the document starts; may be empty.
        options: steps, temperature, top_p, top_k, key of `sample`; stop, a text that is one token.

    Returns:
        An iterator of strings, without the prompt. A character that several ids make up comes out when it is
        whole.

    Raises:
        ValueError: an argument is out of range, or `stop` is not one token.
    """
    start, before = _document(tokenizer, prompt)
    ids = sample(module, variables, start, **options | {"stop": _stop_id(tokenizer, options.get("stop"))})
    return _decode(ids, tokenizer.stream(before))


def sample_texts(
    module: Any, variables: Any, tokenizer: Tokenizer, prompt: str, *, samples: int, **options: Any
) -> list[str]:
    """Continue a document in several ways: `sample_several` from and to text, called as `sample_text`."""
    start, before = _document(tokenizer, prompt)
    options |= {"stop": _stop_id(tokenizer, options.get("stop"))}
    answers = sample_several(module, variables, start, samples=samples, **options)
    return ["".join(_decode(iter(ids), tokenizer.stream(before))) for ids in answers]


def _document(tokenizer: Tokenizer, prompt: str) -> tuple[np.ndarray, list[int]]:
    """The ids that a document starts with, and those of them that are text."""
    ids = tokenizer.encode(prompt)
    return np.concatenate([[tokenizer.separator], ids]).astype(np.int32), ids.tolist()


def _stop_id(tokenizer: Tokenizer, stop: str | None) -> int | None:
    if stop is None:
        return None
    ids = tokenizer.encode(stop)
    if len(ids) != 1:
        raise ValueError(f"stop: got {stop!r}, {len(ids)} tokens; expected one token")
    return int(ids[0])


def _decode(ids: Iterator[int], stream) -> Iterator[str]:
    for token in ids:
        if piece := stream.push(token):
            yield piece
    if rest := stream.flush():
        yield rest


def _sample(module, variables, prompt, options: _Options, keys) -> Iterator[np.ndarray]:
    """The next ids [samples], step by step, until each answer has had its stop; one goes on past it."""
    if not options.steps:
        return
    first, *rest = _chunks(prompt)
    logits_BTV, state = _start(module, variables, np.tile(first, (len(keys), 1)))
    for chunk in rest:
        logits_BTV, state = _go_on(module, variables, state, np.tile(chunk, (len(keys), 1)))
    how = (options.temperature, options.top_p, options.top_k)
    token_B = _choose(logits_BTV[:, -1], keys, 0, *how)
    ended = np.zeros(len(keys), bool)
    for number in range(1, options.steps + 1):
        ids = np.asarray(token_B)
        ended |= ids == options.stop if options.stop is not None else False
        if ended.all():
            return
        yield ids
        if number < options.steps:
            token_B, state = _step(module, variables, state, token_B, keys, number, *how)


@functools.partial(jax.jit, static_argnums=0)
def _start(module, variables, tokens_BT):
    return module.apply(variables, tokens_BT)


# The state that goes in is not needed any more: its memory takes the state that comes out.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _go_on(module, variables, state, tokens_BT):
    return module.apply(variables, tokens_BT, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(module, variables, state, token_B, keys_B, number, temperature, top_p, top_k):
    logits_BTV, state = module.apply(variables, token_B[:, None], state)
    return _choose(logits_BTV[:, -1], keys_B, number, temperature, top_p, top_k), state


def _chunks(prompt: np.ndarray) -> Iterator[np.ndarray]:
    """The remainder first, then whole chunks: two lengths, so two programs to compile."""
    first = (len(prompt) - 1) % _PREFILL + 1
    yield prompt[:first]
    yield from prompt[first:].reshape(-1, _PREFILL)


@jax.jit
def _choose(logits_BV, keys_B, number, temperature, top_p, top_k) -> Array:
    """The next id of each answer, by its own key and the number of the step."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
    return jax.vmap(_choose_one, (0, 0, None, None, None))(logits_BV, keys_B, temperature, top_p, top_k)


def _choose_one(logits_V: Array, key: Array, temperature: Array, top_p: Array, top_k: Array) -> Array:
    """One id from the `top_k` likeliest, and of those from the likeliest that have probability `top_p`.

    For temperature 0 the likeliest.
    """
    logits_V = logits_V.astype(jnp.float32)
    scaled_V = logits_V / jnp.where(temperature > 0, temperature, 1)
    descending_V = jnp.sort(scaled_V, descending=True)
    within_V = (jnp.arange(len(descending_V)) < top_k) | (top_k == 0)
    probability_V = jax.nn.softmax(descending_V, where=within_V)
    before_V = jnp.cumsum(probability_V) - probability_V  # of all that are likelier
    # top_p = 1 keeps all, whatever the sum rounds to; the first has nothing before it, and always stays.
    kept_V = within_V & ((before_V < top_p) | (top_p >= 1))
    least = jnp.min(jnp.where(kept_V, descending_V, jnp.inf))
    sampled = jax.random.categorical(key, jnp.where(scaled_V >= least, scaled_V, -jnp.inf))
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits_V)).astype(jnp.int32)
