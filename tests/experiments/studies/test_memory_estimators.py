"""The study of memory's estimators: each family's estimates are near what the compiler asks for."""

import numpy as np
import pytest

from experiments.studies import memory_estimators as study


@pytest.mark.full
def test_estimates_of_configs_that_nothing_was_fitted_to(capsys):
    study.main(["--smoke"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(study.FAMILIES)
    rng = np.random.default_rng(7)
    for make in study.FAMILIES.values():
        config = make(rng)
        real = study.asked_for(config)
        assert 0.4 < study.by_formula(config) / real < 1.6
        assert 0.6 < study.by_liveness(config) / real < 1.4


def test_the_network_learns_sizes_and_errors_are_relative():
    x = np.random.default_rng(0).uniform(0, 2, (40, 4)).astype(np.float32)
    y = x @ np.array([1.0, 0.5, 0.0, -0.5], np.float32) + 10
    assert study.errors(study.learned(x, y, 400)(x), np.exp(y))["median"] < 0.05
    assert study.errors(np.array([2.0, 3.0]), np.array([1.0, 4.0])) == {
        "median": 0.625, "largest": 1.0, "signed": 0.375,
    }  # fmt: skip
