"""The study of parallel blocks: the gap is of one seed, and a short run learns."""

import pytest

from experiments.studies import parallel_block as study


def test_gaps_are_by_seed():
    assert study.gap([2.0, 3.0], [2.1, 3.3]) == {"gap": 0.2, "standard_error": 0.1}


@pytest.mark.full
def test_it_trains(capsys, tmp_path):
    study.main(["--smoke", "--out", str(tmp_path / "no.json")])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [
        ["SlidingWindowAttention", "serial"],
        ["SlidingWindowAttention", "parallel"],
    ]
    assert all(4 < float(line.split("[")[1].split("]")[0]) < 8.5 for line in printed)
    assert not list(tmp_path.iterdir())
