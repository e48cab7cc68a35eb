"""Memories by document against dense models: sizes that are equal, facts that are counted, rare ones held."""

import jax
import numpy as np
import pytest

from experiments.studies import memory_bank


def test_the_world_has_common_and_rare_facts():
    of = memory_bank.world(0, 200)
    names, facts = np.asarray(of.names), np.asarray(of.facts)
    assert len({tuple(name) for name in names}) == 200
    assert all(len(set(facts[names[:, 0] == a, 0])) == 1 for a in np.unique(names[:, 0]))
    assert len(set(facts[names[:, 0] == names[0, 0], 1])) > 1
    share = jax.nn.softmax(of.popularity)
    np.testing.assert_allclose(share[0] / share[9], 10, rtol=1e-5)
    found = np.zeros((8, 2), bool)
    found[:3, 1] = found[0, 0] = True
    assert memory_bank.accuracies(found) == {
        "common": 0.125, "quarter 1": 1, "quarter 2": 0.5, "quarter 3": 0, "quarter 4": 0
    }  # fmt: skip


@pytest.mark.full
def test_memories_hold_rare_facts_in_the_same_size():
    rows = memory_bank.run(400, 0, subjects=512, models=2)
    with_memories, dense = rows["anchor with memories"], rows["dense, same resident size"]
    assert with_memories["resident"] == dense["resident"] == dense["stored"]
    assert with_memories["quarter 4"] > dense["quarter 4"] + 0.2
    assert rows["with another document's memories"]["quarter 4"] < with_memories["quarter 4"] - 0.2


@pytest.mark.full
def test_smoke(capsys):
    memory_bank.main(["--smoke"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == [
        "anchor with memories",
        "with another document's memories",
        "dense, same resident size",
    ]
