"""Low-bit training's study: recipes are legal and differ, a run learns, and gaps are of one seed."""

import numpy as np
import pytest

from experiments.studies import low_bit_training as study


def test_recipes_differ_and_gaps_are_by_seed():
    assert len(set(study.RECIPES.values())) == len(study.RECIPES)
    rows = study.rows_of({"float32": [2.0, 3.0], "plain": [2.1, 3.3]})
    assert rows["plain"] == {
        "held_out_bits_per_byte": [2.1, 3.3],
        "gap": 0.2,
        "standard_error": 0.1,
    }
    train = np.arange(1000) % 256
    one = study.batches(train, 0, 2)
    assert one.shape == (2, study.BATCH, study.LENGTH + 1)
    assert (np.diff(one) % 256 == 1).all()
    assert (one == study.batches(train, 0, 2)).all()
    assert (one != study.batches(train, 1, 2)).any()


@pytest.mark.full
def test_it_trains(capsys, tmp_path):
    study.main(["--smoke", "--out", str(tmp_path / "no.json")])
    printed = capsys.readouterr().out.splitlines()
    assert [line[:30].strip() for line in printed] == ["float32", "fp8_delayed"]
    assert all(4 < float(line[30:].split("]")[0].strip(" [")) < 8.5 for line in printed)
    assert not list(tmp_path.iterdir())
