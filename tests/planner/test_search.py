"""The search over meshes: its model by a simulated pipeline, its choice by brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import frugax
from frugax.planner import Cluster, Configuration, Workload, device_bytes, latency, place, search

WORK = Workload(
    layers=4, batch=8, time=16, layer_flops=1e3, layer_gradients=4000, layer_state=16000,
    outer_gradients=1000, outer_state=4000, stream=64, kept=600, kept_whole=100,
)  # fmt: skip


def cluster(devices, seed=0, memory=1e9, flops=1e9):
    """Links from 1 to 30 MB/s, different in each direction."""
    rng = np.random.default_rng(seed)
    return Cluster(1e6 * np.exp(rng.uniform(0, 3.4, (devices, devices))), flops, memory)


@pytest.mark.parametrize(("stages", "microbatches"), list(itertools.product((2, 3, 4), (1, 2, 5, 8))))
def test_messages_are_those_of_a_simulated_pipeline(stages, microbatches):
    """With links of equal speed; forward and backward passes of any shares of a microbatch's seconds."""
    work = WORK._replace(layers=12, batch=microbatches)
    c = Configuration(pipeline=stages)
    equal = Cluster(np.full((stages, stages), 2e6), 1e9, 1e9)
    found = latency(work, c, equal)
    each = found.compute / microbatches
    schedule = frugax.parallel.pipeline_schedule(stages, microbatches)
    for share in (0.3, 0.5):
        by_clock = frugax.parallel.pipeline_timeline(
            schedule, forward=share * each, backward=(1 - share) * each, send=16 * 64 / 2e6
        )
        assert found.seconds == pytest.approx(by_clock.seconds)


def test_collectives_by_hand():
    """Two devices along each axis in turn, a link of 1 MB/s one way and 4 MB/s the other."""
    slow = Cluster(np.array([[1e9, 4e6], [1e6, 1e9]]), 1e9, 1e9)
    compute = 3 * 4 * 8 * 16 * 1e3 / 1e9  # of the whole step on one device
    tokens = 8 * 16
    cases = {
        "tensor": compute / 2 + 4 * 4 * (tokens * 64) / 1e6,
        "sequence": compute / 2 + 8 * 4 * (tokens / 2 * 64) / 2 / 1e6,
        "data": compute / 2 + (4 * 4000 + 1000) / 1e6,
        "fsdp": compute / 2 + 4 * (4 * 4000) / 1e6 + (4 * 4000 + 1000) / 2 / 1e6,
    }
    for axis, seconds in cases.items():
        assert latency(WORK, Configuration(**{axis: 2}), slow).seconds == pytest.approx(seconds), axis


@pytest.mark.parametrize("devices", [4, pytest.param(6, marks=pytest.mark.full)])
def test_the_choice_is_brute_forces(devices):
    """Over all configurations that fit and all orders of devices, on links that differ."""
    # 70 kB: the whole state with a microbatch does not fit on one device.
    work = WORK._replace(layers=devices, batch=devices)
    here = cluster(devices, memory=70e3, flops=1e8)
    every = list(frugax.planner.configurations(work, devices))
    fit = [c for c in every if device_bytes(work, c) <= here.memory]
    assert 0 < len(fit) < len(every)
    orders = list(itertools.permutations(range(devices)))
    least = {c: min(latency(work, c, here, order).seconds for order in orders) for c in fit}
    best = search(work, here, steps=120 if devices == 4 else 1500)
    assert best[0].seconds == pytest.approx(min(least.values()))
    assert best[0].configuration == min(least, key=least.get)
    for found in best:
        assert found.bytes == device_bytes(work, found.configuration) <= here.memory
        assert found.seconds == latency(work, found.configuration, here, found.placement).seconds
    assert [f.seconds for f in best] == sorted(f.seconds for f in best)


def test_places_are_better_than_the_given_order():
    """Fast links join devices that the given order puts apart; equal links leave nothing to gain."""
    c = Configuration(pipeline=2, data=2, tensor=2)
    for seed in range(2):
        here = cluster(8, seed, flops=1e12)
        order, seconds = place(WORK, c, here, steps=500)
        assert sorted(order) == list(range(8))
        assert seconds == latency(WORK, c, here, order).seconds < 0.9 * latency(WORK, c, here).seconds
    equal = Cluster(np.full((8, 8), 1e6), 1e9, 1e9)
    assert place(WORK, c, equal, steps=20)[1] == latency(WORK, c, equal).seconds


def test_memory_is_that_of_real_trees():
    """No choice holds more bytes of params, gradients and Adam's moments than the cap, leaf by leaf."""
    width, layers = 16, 4
    layer = {"up": jnp.zeros((width, 4 * width)), "down": jnp.zeros((4 * width, width))}
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    state = size(layer) * 2 + size(optax.scale_by_adam().init(layer)) - 4
    work = WORK._replace(
        layers=layers, layer_gradients=size(layer), layer_state=state, outer_gradients=0, outer_state=0
    )
    for cap in (40e3, 80e3, 200e3):
        for found in search(work, cluster(8, memory=cap), steps=0, keep=100):
            c = found.configuration
            parts = c.tensor * c.fsdp  # that share the trees of a stage
            held = layers // c.pipeline * state / parts
            assert held <= found.bytes <= cap
    assert search(work, cluster(8, memory=1e3)) == []


def test_given_sizes_stay_and_free_ones_take_the_rest():
    found = {c.axes for c in frugax.planner.configurations(WORK, 8, axes=["data"], given={"sequence": 4})}
    assert found == {(1, 2, 1, 4, 1)}
    for one in search(WORK, cluster(8), given={"pipeline": 2, "data": 1}, steps=0, keep=100):
        assert one.configuration.axes[:2] == (2, 1)


def test_what_can_not_be():
    here = cluster(4)
    with pytest.raises(
        ValueError, match=r"configuration: got \(1, 2, 1, 1, 1\); expected sizes that multiply to 4"
    ):
        latency(WORK, Configuration(data=2), here)
    with pytest.raises(ValueError, match=r"placement: got \[0, 0, 1, 2\]; expected each of 4 devices once"):
        latency(WORK, Configuration(data=4), here, [0, 0, 1, 2])
    with pytest.raises(ValueError, match="axes: got 'rows'; expected some of pipeline, data"):
        list(frugax.planner.configurations(WORK, 4, axes=["rows"]))
    with pytest.raises(ValueError, match="axes: got 'experts'; expected some of pipeline, data"):
        list(frugax.planner.configurations(WORK, 4, given={"experts": 2}))
