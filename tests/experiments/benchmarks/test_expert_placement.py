"""The study of placements runs, and its ways are in the order that they must be."""

import pytest

from experiments.benchmarks import expert_placement


@pytest.mark.full
def test_copies_even_the_load_out_for_fewer_bytes_than_all_experts():
    found = expert_placement.rows(steps=2, slots=(1,))
    alone, copied, known, everywhere = found.values()
    assert alone["busiest_over_mean"] > copied["busiest_over_mean"] > known["busiest_over_mean"] >= 1
    assert alone["token_MB"] > copied["token_MB"] > 0
    assert 0 < copied["expert_MB"] < everywhere["expert_MB"] / 10
