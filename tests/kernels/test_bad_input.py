"""Calls that can't be right, or that a kernel can't serve, say what was wrong and what is expected."""

import re

import jax
import pytest
from jax.experimental import checkify

import frugax

from .harness import OPERATIONS, parts, structs

NARROW = {"float64": "float32", "int64": "int32"}


def in_32_bits(arguments):
    """Return the arguments in the dtypes that they have without jax_enable_x64."""
    return jax.tree.map(
        lambda x: x.astype(NARROW.get(str(x.dtype), x.dtype)) if isinstance(x, jax.Array) else x, arguments
    )


pytestmark = pytest.mark.usefixtures("unchecked_types")


def listed(name: str) -> list:
    """Return (operation, each entry of a list) as parameters."""
    return [
        pytest.param(row.name, *entry, id=f"{row.name}-{i}")
        for row in OPERATIONS.values()
        for i, entry in enumerate(getattr(row.calls, name, ()))
    ]


def shapes_of(row, arguments):
    """Return the results' shapes: tracing is enough to tell what can't be right."""
    floats, arrays, static = parts(arguments)
    return jax.eval_shape(lambda given: row.function(**given, **static), floats | arrays)


@pytest.mark.parametrize(("operation", "change", "message"), listed("WRONG"))
def test_an_error_names_the_argument(operation, change, message):
    row = OPERATIONS[operation]
    with pytest.raises(ValueError, match=message):
        shapes_of(row, in_32_bits(row.calls.GOOD | change))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_good_call_raises_nothing_and_an_unknown_backend_does(operation):
    row = OPERATIONS[operation]
    assert shapes_of(row, row.calls.GOOD)
    with pytest.raises(ValueError, match=f"{row.choice}: got 'cuda'; expected "):
        shapes_of(row, row.calls.GOOD | {row.choice: "cuda"})


@pytest.mark.parametrize(("operation", "backend", "change", "reason"), listed("REFUSED"))
def test_a_kernel_that_cannot_serve_says_why(operation, backend, change, reason):
    row = OPERATIONS[operation]
    arguments = in_32_bits(row.calls.GOOD | change)
    said = frugax.kernels.explain(operation, **structs(arguments))
    assert re.search(f"not {backend}: .*{reason}", said)
    with pytest.raises(ValueError, match=f"backend='{backend}' can't serve this call: .*{reason}"):
        shapes_of(row, arguments | {"backend": backend})
    assert shapes_of(row, arguments)  # None falls back to xla


@pytest.mark.parametrize(("operation", "change", "message"), listed("CHECKED"))
def test_checkify_reports_values_that_cannot_be_right(operation, change, message):
    row = OPERATIONS[operation]
    floats, arrays, static = parts(row.calls.GOOD | change)
    call = jax.jit(lambda given: row.function(**given, **static))
    error, _ = checkify.checkify(call, errors=checkify.user_checks)(floats | arrays)
    if message is None:
        assert error.get() is None
    else:
        assert message in error.get()
