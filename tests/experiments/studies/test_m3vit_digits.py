"""Tasks on digits: edges by hand, equal work, the relative difference, and a run of every score."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import m3vit_digits as study
from frugax.layers import LinearAttention
from frugax.models import M3ViT


def test_edges_are_lengths_of_gradients_in_the_order_of_patches():
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    found = np.asarray(study.edges(jnp.asarray(images)))
    for b, y, x in np.ndindex(2, 8, 8):
        down = images[b, min(y + 1, 7), x, 0] - images[b, y, x, 0]
        right = images[b, y, min(x + 1, 7), 0] - images[b, y, x, 0]
        got = found[b, y // 2 * 4 + x // 2, y % 2 * 2 + x % 2]
        np.testing.assert_allclose(got, np.hypot(down, right), atol=2e-3)


def test_a_task_meets_as_many_parameters_in_every_encoder():
    """But for the routers, at most 7 %; and better is more accuracy, or less error of edges."""
    active = {}
    for name, args in study.MODELS.items():
        encoder = M3ViT(**study.SHAPE, mixer=LinearAttention(heads=4), **args)
        active[name] = study.sizes(study.Heads(encoder), (1, 8, 8, 1))["active"]
    assert max(active.values()) < 1.07 * min(active.values())
    mine = {"digit": [0.8], "above four": [0.9], "edges": [0.5]}
    alone = {"digit": [0.5], "above four": [0.9], "edges": [0.4]}
    assert study.mean_difference(mine, alone) == [round((0.6 + 0 - 0.25) / 3, 4)]


@pytest.mark.full
def test_smoke(capsys):
    study.main(["--smoke"])
    printed = capsys.readouterr().out
    assert all(f"'{task}': [" in printed for task in study.TASKS)
    assert "'shared by digit, edges': [" in printed
