"""Sampling from a language model token by token, in constant memory."""

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

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
    key: Array,
) -> Iterator[int]:
    """Continues a prompt, one id at a time, with as much memory for the last as for the first.

    The prompt goes through in chunks; from then on one compiled step with T == 1 replaces the state in place.

    Args:
        module: a language model, `module.apply(variables, tokens, state=None, segment_ids=None) -> (logits,
            state)`, hashable, whose state keeps its shapes from call to call.
        variables: its variables.
        prompt_ids: at least one id; a document starts with the tokenizer's separator.
        steps: how many ids to give.
        temperature: divides the logits; 0 takes the likeliest id each time.
        top_p: samples only from the likeliest ids that together have this probability, in (0, 1].
        key: a `jax.random.key`. The same key gives the same ids.

    Returns:
        An iterator of `steps` ids.

    Raises:
        ValueError: an argument is out of range.

    Source: Holtzman et al., 2020, arXiv 1904.09751, for top_p.
    """
    prompt = np.asarray(prompt_ids)
    if prompt.ndim != 1 or not len(prompt) or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(
            f"prompt_ids has shape {prompt.shape} and dtype {prompt.dtype}: give at least one integer id"
        )
    steps = operator.index(steps)
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (the likeliest id) or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
    return _sample(module, variables, prompt.astype(np.int32), steps, float(temperature), float(top_p), key)


def sample_text(
    module: Any, variables: Any, tokenizer: Tokenizer, prompt: str, **options: Any
) -> Iterator[str]:
    """`sample` from and to text: the continuation of a document that starts with `prompt`, piece by piece.

    Args:
        module: as in `sample`.
        variables: as in `sample`.
        tokenizer: from `experiments.data.load_tokenizer`.
        prompt: how the document starts; may be empty.
        options: steps, temperature, top_p, key of `sample`.

    Returns:
        An iterator of strings, without the prompt. A character that several ids make up comes out when it is
        whole.
    """
    prompt_ids = np.concatenate([[tokenizer.separator], tokenizer.encode(prompt)]).astype(np.int32)
    ids = sample(module, variables, prompt_ids, **options)
    return _decode(ids, tokenizer.stream())


def _decode(ids: Iterator[int], stream) -> Iterator[str]:
    for token in ids:
        if piece := stream.push(token):
            yield piece
    if rest := stream.flush():
        yield rest


def _sample(module, variables, prompt, steps, temperature, top_p, key) -> Iterator[int]:
    first, *rest = _chunks(prompt)
    logits_BTV, state = _start(module, variables, first[None])
    for chunk in rest:
        logits_BTV, state = _go_on(module, variables, state, chunk[None])
    logits_V, token = logits_BTV[0, -1], None
    for number in range(steps):
        here = jax.random.fold_in(key, number)
        if token is None:
            token = _choose(logits_V, here, temperature, top_p)
        else:
            token, state = _step(module, variables, state, token, here, temperature, top_p)
        yield int(token)


@functools.partial(jax.jit, static_argnums=0)
def _start(module, variables, tokens_BT):
    return module.apply(variables, tokens_BT)


# The state that goes in is not needed any more: its memory takes the state that comes out.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _go_on(module, variables, state, tokens_BT):
    return module.apply(variables, tokens_BT, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(module, variables, state, token, key, temperature, top_p):
    logits_BTV, state = module.apply(variables, token[None, None], state)
    return _choose(logits_BTV[0, -1], key, temperature, top_p), state


def _chunks(prompt: np.ndarray) -> Iterator[np.ndarray]:
    """The remainder first, then whole chunks: two lengths, so two programs to compile."""
    first = (len(prompt) - 1) % _PREFILL + 1
    yield prompt[:first]
    yield from prompt[first:].reshape(-1, _PREFILL)


@jax.jit
def _choose(logits_V: Array, key: Array, temperature: Array, top_p: Array) -> Array:
    """One id from the likeliest that together have probability `top_p`; the likeliest for temperature 0."""
    logits_V = logits_V.astype(jnp.float32)
    scaled_V = logits_V / jnp.where(temperature > 0, temperature, 1)
    descending_V = jnp.sort(scaled_V, descending=True)
    probability_V = jax.nn.softmax(descending_V)
    before_V = jnp.cumsum(probability_V) - probability_V  # of all that are likelier
    # top_p = 1 keeps all, whatever the sum rounds to; the first has nothing before it, and always stays.
    kept_V = (before_V < top_p) | (top_p >= 1)
    least = jnp.min(jnp.where(kept_V, descending_V, jnp.inf))
    sampled = jax.random.categorical(key, jnp.where(scaled_V >= least, scaled_V, -jnp.inf))
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits_V)).astype(jnp.int32)
