"""The MeZO experiment, on an untrained model: its task, and what a step needs."""

import json
import math

import numpy as np
import pytest

from experiments.studies import mezo_finetune


@pytest.mark.full
@pytest.mark.parametrize("name", ["MeZO", "forward gradient"])
def test_a_few_steps(name, tmp_path, monkeypatch):
    monkeypatch.setattr(mezo_finetune, "HELD_OUT", 400)
    mezo_finetune.main(["--smoke", "--only", name, "--out", str(tmp_path / "r.json")])
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"].values()
    assert abs(row["loss_before"] - math.log(4)) < 1e-4  # as it is rounded
    assert row["accuracy"] != row["accuracy_before"] == 0.25  # a head of zeros has no opinion
    if name == "MeZO":
        assert row["step_temporaries"] < row["inference_temporaries"] + 2**16
    assert row["state_bytes"] == 0


def test_snippets():
    found = mezo_finetune.snippets(400, True, 0)
    assert np.bincount(found.labels).tolist() == [100] * 4
    for label, package in enumerate(mezo_finetune.PACKAGES):
        train, test = (mezo_finetune.files(package, held_out) for held_out in (False, True))
        assert not set(train) & set(test)
        assert len(train) > 2 * len(test) > 4
        rows = found.tokens[found.labels == label]
        text = b"".join(path.read_bytes() for path in test)
        assert all(row.astype(np.uint8).tobytes() in text for row in rows)
