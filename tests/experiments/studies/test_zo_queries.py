"""Accuracy over queries: a method's run, and every method's step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import zo_queries


def test_a_run_counts_queries_and_learns():
    draw, params = zo_queries.task(jax.random.key(0))
    x, labels = draw(jax.random.key(1), 400, True)
    assert sorted(np.unique(labels)) == list(range(zo_queries.LABELS))
    before = jnp.mean(jnp.argmax(zo_queries.scores(params, x), -1) == labels)
    found = zo_queries.run(zo_queries.METHODS["hybrid"], draw, params, [120, 240], 1)
    assert len(found["accuracy"]) == 2
    assert found["accuracy"][-1] > before + 0.05


@pytest.mark.full
def test_every_method_takes_its_steps(capsys):
    zo_queries.main(["--smoke"])
    printed = capsys.readouterr().out.splitlines()
    assert [line[:22].strip() for line in printed] == list(zo_queries.METHODS)
