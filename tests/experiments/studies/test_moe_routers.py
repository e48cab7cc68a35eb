"""The study of routers: what it says of loads is what loads are, gaps are of one seed, and a run learns."""

import jax
import numpy as np
import pytest

from experiments.studies import moe_routers as study


def test_loads_of_two_layers_by_hand():
    even = np.tile(np.eye(4, dtype=np.float32), (4, 1))  # 16 tokens, one expert each, all equally
    one = np.zeros((16, 4), np.float32)
    one[:, 2] = 0.5
    found = study.of_loads([even, one])
    assert found["load_entropy"] == 0.5  # 1 and 0
    # A capacity of 1.25 * 4 = 5 rows keeps 5 of 16.
    assert found["dropped_share"] == pytest.approx((0 + 11 / 16) / 2, abs=1e-4)
    assert found["active_share"] == 0.25
    assert found["active_share_of_chunks"] == (1 + 0.25) / 2


def test_gaps_are_by_seed():
    rows = {"softmax": {"held_out_bits_per_byte": [2.0, 3.0]}, "hash": {"held_out_bits_per_byte": [2.1, 3.3]}}
    assert study.with_gaps(rows)["hash"] | {"held_out_bits_per_byte": 0} == {
        "held_out_bits_per_byte": 0,
        "gap": 0.2,
        "standard_error": 0.1,
    }


def test_every_contender_builds_and_all_do_about_the_same_work():
    rows = np.zeros((1, 8), np.int32)
    sizes = {}
    for name, contender in study.CONTENDERS.items():
        module = study.build(contender)
        rngs = {"params": jax.random.key(0), "router": jax.random.key(1)}
        params = jax.eval_shape(module.init, rngs, rows)["params"]
        sizes[name] = sum(x.size for x in jax.tree.leaves(params))
    assert sizes["dense"] < 0.6 * sizes["softmax"]
    assert sizes["softmax"] == sizes["sigmoid, balanced by a bias"] == sizes["pre-attention"]
    assert 0.8 < sizes["BlockFFN"] / sizes["softmax"] < 1.2
    assert sizes["hash, one expert twice as wide"] > 1.5 * sizes["softmax"]


@pytest.mark.full
def test_it_trains(capsys, tmp_path):
    study.main(["--smoke", "--out", str(tmp_path / "no.json")])
    printed = capsys.readouterr().out.splitlines()
    assert [line[:40].strip() for line in printed] == ["softmax", "sigmoid, balanced by a bias"]
    assert all(4 < float(line[40:].split("]")[0].strip(" [")) < 8.5 for line in printed)
    assert not list(tmp_path.iterdir())
