"""The configs for pods: their sizes are what their names say, and a shallow one compiles for its devices."""

import importlib.util
import math

import jax
import pytest

import frugax
from experiments.benchmarks.pods import PODS, config_of
from experiments.configs.checks import check_config
from experiments.plan import plan_config
from experiments.trainer.runs import build_model, shapes_of
from frugax.planner import topology

PARAMS = {  # billions, and of them those that a token meets
    "gla_1p3b": (1.3, 1.3),
    "gla_1p3b_h100": (1.3, 1.3),
    "hybrid_7b": (7, 7),
    "moe_30b_a3b": (30, 3),
    "gla_7b_1m": (7, 7),
}
AXES = {
    "hybrid_7b": {"fsdp", "sequence"},
    "moe_30b_a3b": {"fsdp", "expert"},
    "gla_7b_1m": {"fsdp", "sequence"},
}


@pytest.mark.parametrize("name", PODS)
def test_a_config_is_as_large_as_its_name_says_and_fits_its_mesh(name):
    config = config_of(name)
    check_config(config)
    shapes = jax.tree.leaves_with_path(shapes_of(build_model(config), config))
    sizes = {jax.tree_util.keystr(path): x.size for path, x in shapes}
    experts = sum(size for path, size in sizes.items() if "experts" in path)
    args = config.model.blocks[config.model.pattern[0]].channel_args
    whole = sum(sizes.values())
    met = whole - experts + experts * args.get("k", 1) // args.get("experts", 1)
    for billions, size in zip(PARAMS[name], (whole, met), strict=True):
        assert abs(size / 1e9 / billions - 1) < 0.13, size
    chips = math.prod(map(int, PODS[name].partition(":")[2].split("x")))
    assert math.prod(config.mesh[axis] for axis in frugax.parallel.AXES) == chips


@pytest.mark.full
@pytest.mark.deviceless
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", PODS)
def test_a_shallow_one_compiles_for_its_devices(name):
    """With its width, its batch and its mesh; loops over depth make a deep program as long."""
    if PODS[name].startswith("h100") and importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs jax-cuda13-plugin")
    config = config_of(name)
    config.model.repeats = 2
    made = plan_config(config, topology(PODS[name]))
    assert made.fits(spare=0.1)
    assert not made.unread
    talking = {axis for axes, _ in made.collectives for axis in axes}
    assert talking >= AXES.get(name, {"fsdp"})
    assert 0 < made.mfu < 1
