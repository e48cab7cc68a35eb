"""NaN and infinity stay in their document: others have the outputs, states and gradients that they had."""

import jax
import numpy as np
import pytest

from .harness import OPERATIONS, over, value_and_gradients
from .test_causality import tokens_of

LENGTH, CUT = 9, 4  # tokens, and where the second document starts


def isolating() -> list:
    """Return (operation, backend): by default what runs on a CPU."""
    return [
        pytest.param(name, backend, marks=[] if backend is None else pytest.mark.full)
        for name in over(lambda row: "segment_ids" in row.axes)
        for backend in OPERATIONS[name].cases
        if backend not in ("chunks", "fft")
    ]


def call_of(row, backend):
    """Return arguments with two documents in every row, and the names of those that have tokens."""
    arguments = row.arguments(row.small_on(backend))
    arguments |= {"reverse": False} if "reverse" in arguments else {}
    shape = arguments["segment_ids"].shape
    arguments["segment_ids"] = np.broadcast_to(np.arange(LENGTH) >= CUT, shape).astype(np.int32)
    tokens = tokens_of(row, arguments)
    return arguments, tokens


def spoilt(x, at, value):
    x = np.array(x)
    x[0, at] = value
    return x


def check_others(got, want, first: bool, tokens) -> None:
    """Hold the document that has no bad number, of row 0, and row 1 to what they were."""
    (out, *states), gradients = got
    (clean, *clean_states), clean_gradients = want
    good = slice(CUT, None) if first else slice(CUT)
    check_equal(out, clean, good)
    if first:  # the state is the second document's, whatever was in the first
        for x, y in zip(jax.tree.leaves(states), jax.tree.leaves(clean_states), strict=True):
            check_equal(x, y)
    for name in tokens:
        check_equal(gradients[name], clean_gradients[name], good, name)


def check_equal(x, y, good=slice(None), name="") -> None:
    """Hold tokens `good` of row 0, and row 1, to what they were, but for sums that are rounded otherwise."""
    x, y = (np.asarray(z, np.float32) for z in (x, y))
    for a, b in ((x[0, good], y[0, good]), (x[1:], y[1:])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5 * np.abs(y).max(), err_msg=name)


@pytest.mark.nan
@pytest.mark.parametrize(("operation", "backend"), isolating())
def test_a_bad_number_stays_in_its_document(operation, backend):
    row = OPERATIONS[operation]
    arguments, tokens = call_of(row, backend)
    want = value_and_gradients(row, arguments, backend)
    for number, name in enumerate(tokens):
        at = (2, 6)[number % 2]
        for place, value in ((at, np.nan), (8 - at, np.nan if name in ("A", "log_decay") else np.inf)):
            bad = arguments | {name: spoilt(arguments[name], place, value)}
            got = value_and_gradients(row, bad, backend)
            assert np.isinf(value) or np.isnan(np.asarray(got[0][0], np.float32)[0, place:]).any()
            check_others(got, want, place < CUT, tokens)
    if isinstance(arguments.get("initial_state"), np.ndarray):
        bad = arguments | {"initial_state": spoilt(arguments["initial_state"], 0, np.nan)}
        check_others(value_and_gradients(row, bad, backend), want, True, tokens)


@pytest.mark.nan
@pytest.mark.parametrize(("operation", "backend"), isolating())
def test_a_bad_cotangent_stays_in_its_document(operation, backend):
    """As a loss sends it back that overflows in one document, where the operation's results are finite."""
    row = OPERATIONS[operation]
    arguments, tokens = call_of(row, backend)
    _, want = value_and_gradients(row, arguments, backend, np.ones_like(arguments["segment_ids"], np.float32))
    for at in (2, 6):
        keep = spoilt(np.ones_like(arguments["segment_ids"], np.float32), at, np.nan)
        _, got = value_and_gradients(row, arguments, backend, keep)
        good = slice(CUT, None) if at < CUT else slice(CUT)
        for name in tokens:
            check_equal(got[name], want[name], good, name)
        assert any(np.isnan(np.asarray(got[n], np.float32)[0]).any() for n in tokens)
