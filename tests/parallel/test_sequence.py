"""Operations with time split over eight devices give the numbers of one device, and exchange only states."""

import jax.numpy as jnp
import pytest

from frugax import parallel
from tests.devices import run_on_eight_devices


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("fixed", marks=pytest.mark.full),
        "scalar",
        pytest.param("channel", marks=pytest.mark.full),
        "recurrence",
        "convolution",
        "scan",
        pytest.param("dual", marks=pytest.mark.full),
        "legendre",
        pytest.param("trapezoid", marks=pytest.mark.full),
    ],
)
def test_split_sequence_equals_whole(case):
    run_on_eight_devices("tests.parallel.sequence_calls", case, "reference")


@pytest.mark.nan
@pytest.mark.parametrize(
    "case",
    [
        "channel",
        *(
            pytest.param(x, marks=pytest.mark.full)
            for x in ("scalar", "recurrence", "convolution", "scan", "dual", "trapezoid")
        ),
    ],
)
def test_fast_form_splits_too_and_keeps_nan_in_its_document(case):
    run_on_eight_devices("tests.parallel.sequence_calls", case, "xla")


@pytest.mark.nan
@pytest.mark.parametrize(
    "case",
    [
        "recurrence",
        *(
            pytest.param(x, marks=pytest.mark.full)
            for x in ("fixed", "channel", "convolution", "scan", "dual", "legendre", "trapezoid")
        ),
    ],
)
def test_padded_rows_and_states_of_documents(case):
    run_on_eight_devices("tests.parallel.sequence_calls", case, "rows")


@pytest.mark.full
def test_shut_gates_and_many_documents():
    run_on_eight_devices("tests.parallel.sequence_calls", "extremes", "xla")


def test_too_short_a_shard_is_named():
    with pytest.raises(ValueError, match=r"x: got float\d\d\[1, 2, 4\] on a shard; expected 3 tokens"):
        parallel.causal_conv1d(jnp.ones((1, 2, 4)), jnp.ones((4, 4)), axis_name="time")
