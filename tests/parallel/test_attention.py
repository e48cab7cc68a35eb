"""Attention with time split over eight devices, and products in pieces, give the numbers of one device."""

import jax.numpy as jnp
import pytest

import frugax
from tests.devices import run_on_eight_devices


@pytest.mark.parametrize(
    "case",
    [
        "ring_attention 4 packed causal",
        pytest.param("ring_attention 8 whole causal", marks=pytest.mark.full),
        pytest.param("ring_attention balanced", marks=pytest.mark.full),
        pytest.param("ring_self_attention balanced", marks=pytest.mark.full),
        pytest.param("ring_attention 1 whole all", marks=pytest.mark.full),
        "ulysses 2 packed causal",
        pytest.param("ulysses 8 whole all", marks=pytest.mark.full),
        pytest.param("ring_self_attention 4 packed causal", marks=pytest.mark.full),
        "ring_self_attention 8 whole all",
    ],
)
def test_split_attention_equals_whole(case):
    run_on_eight_devices("tests.parallel.attention_calls", *case.split())


@pytest.mark.parametrize("rows", ["2", pytest.param("3", marks=pytest.mark.full)])
def test_products_in_pieces_equal_whole_ones(rows):
    run_on_eight_devices("tests.parallel.attention_calls", "products", rows)


def test_overlap_is_bounded_by_the_longer_part():
    of = frugax.parallel.overlapped_seconds
    assert of(4.0, 2.0, 1) == 6
    assert of(2.0, 4.0, 8) == pytest.approx(4 + 2 / 8)
    assert all(of(3.0, 2.0, n) >= of(3.0, 2.0, n + 1) > 3 for n in range(1, 9))


def test_wrong_sizes_are_named(unchecked_types):
    q = jnp.ones((1, 4, 4, 2))
    with pytest.raises(ValueError, match=r"k: got \[1, 4, 3, 2\]; expected \[1, 4, a divisor of 4, 2\]"):
        frugax.parallel.ring_attention(q, q[:, :, :3], q[:, :, :3], axis_name="time")
    with pytest.raises(ValueError, match=r"positions: got \[1, 3\]; expected \[1, 4\]"):
        frugax.parallel.ring_attention(q, q, q, axis_name="time", positions=jnp.ones((1, 3), int))
