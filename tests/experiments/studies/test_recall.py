"""The study of recall: rows ask for what they hold, recall grows with the state, and a short run learns."""

import jax
import numpy as np
import pytest

from experiments.benchmarks.markdown import read
from experiments.studies import recall as study


def test_a_row_asks_for_each_keys_value_once():
    tokens, wanted = map(np.asarray, study.rows(jax.random.key(0), 20))
    N = study.PAIRS
    assert tokens.shape == (20, 3 * N)
    for row, values in zip(tokens, wanted, strict=True):
        pairs = dict(zip(row[: 2 * N : 2].tolist(), row[1 : 2 * N : 2].tolist(), strict=True))
        assert len(pairs) == N
        assert max(pairs) < study.KEYS <= min(pairs.values())
        assert sorted(row[2 * N :]) == sorted(pairs)
        assert [pairs[key] for key in row[2 * N :].tolist()] == values.tolist()


def test_recall_grows_with_the_state():
    """The committed results have the frontier of Based's figure, as docs say."""
    found = read("recall")["rows"]
    assert [(r["kind"], r["size"]) for r in found] == [(k, s) for k, of in study.mixers().items() for s in of]
    for kind in study.mixers():
        sizes, recalled = zip(
            *((r["state_bytes"], r["recalled"]) for r in found if r["kind"] == kind), strict=True
        )
        assert list(sizes) == sorted(sizes)
        assert list(recalled) == sorted(recalled), kind
    least = {r["kind"]: r["state_bytes"] for r in reversed(found) if r["recalled"] > 0.98}
    assert max(least["taylor"], least["based"]) < 0.5 * least["window"]


@pytest.mark.full
def test_it_trains(capsys, tmp_path):
    study.main(["--smoke", "--out", str(tmp_path / "no.json")])
    assert "based keys of 2, window 4: 1560 bytes, 0." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
