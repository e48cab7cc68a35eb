"""The study of long documents: packing is uneven, balance is cheap, several degrees no slower than one."""

import numpy as np
import pytest

from experiments.studies import long_documents as study


def test_attention_is_balanced_for_fewer_bytes():
    rng = np.random.default_rng(3)
    lengths, homes = study.packed(rng, 4, 2**12)
    assert [sum(n for n, h in zip(lengths, homes, strict=True) if h == r) for r in range(4)] == [2**12] * 4
    found = study.attention(4, 2**13, 2)
    assert found["packed"]["GB"] == 0 < found["balanced"]["GB"] < found["split by document"]["GB"]
    assert found["balanced"]["imbalance"] < 1.12 < found["packed"]["imbalance"]


@pytest.mark.full
def test_groups_of_several_degrees_are_no_slower():
    for row in study.groups(8, 2**16, 1, 2.0):
        assert sum(row["degrees"]) <= 8
        assert row["seconds"] <= 1.01 * row["its_seconds"]
