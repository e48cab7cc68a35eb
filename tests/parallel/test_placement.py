"""Experts with copies: any placement gives one device's numbers; planned ones even the load out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from frugax import moe, parallel
from tests.devices import run_on_eight_devices


@pytest.mark.parametrize("case", ["plain", pytest.param("bounded", marks=pytest.mark.full)])
def test_any_copies_give_the_numbers_of_one_device(case):
    """Outputs, losses, gradients of tokens, router and experts; no token is lost; copies are made again."""
    run_on_eight_devices("tests.parallel.placement_calls", case)


def busiest(load, copies) -> float:
    """Tokens of the busiest device, where holders share an expert's tokens evenly."""
    devices, own = len(copies), len(load) // len(copies)
    held = np.repeat(np.eye(devices, dtype=bool), own, 0)
    for device, wanted in enumerate(copies):
        for expert in wanted:
            if expert >= 0:
                assert not held[expert, device], "a copy for nothing"
                held[expert, device] = True
    return float((np.asarray(load) / held.sum(1) @ held).max())


def test_plans_even_the_load_out():
    """Against every possible placement of two devices; and the bounds that they must keep, of eight."""
    rng = np.random.default_rng(0)
    plan = jax.jit(parallel.plan_placement, static_argnames=("devices", "slots", "per_pair"))
    worse = []
    for _ in range(20):
        load = rng.pareto(1.0, 6).astype(np.float32)
        best = min(busiest(load, [[a], [b]]) for a, b in itertools.product([-1, 3, 4, 5], [-1, 0, 1, 2]))
        worse.append(busiest(load, np.asarray(plan(jnp.array(load), devices=2, slots=1))) / best)
    assert max(worse) < 1.25
    assert np.mean(worse) < 1.02
    skewed = 1 / np.arange(1, 33, dtype=np.float32)
    found = {}
    for slots, per_pair in ((1, None), (3, 1), (3, None)):
        copies = np.asarray(plan(jnp.array(skewed), devices=8, slots=slots, per_pair=per_pair))
        found[slots, per_pair] = busiest(skewed, copies) * 8 / skewed.sum()
        owners = np.where(copies >= 0, copies // 4, -1)
        most = max(np.sum(row == owner) for row in owners for owner in range(8))
        assert most <= (per_pair or slots)
    plain = skewed[:4].sum() * 8 / skewed.sum()
    assert plain > 4
    assert found[3, None] <= found[3, 1] < found[1, None] < plain / 2
    assert found[3, None] < 1.15  # of an even load


def test_tokens_go_to_the_nearest_copy():
    """Here before in the node before elsewhere, and evenly over what is as near."""
    routing = moe.hash_route(jnp.zeros(12, jnp.int32), jnp.zeros(1, jnp.int32), 6)  # all to the first
    near = jnp.array([[-1], [0], [-1], [0], [0], [-1]])  # six devices, one expert each
    far = jnp.where(jnp.arange(6)[:, None] > 3, -1, near)

    @jax.jit
    def indices(copies):
        each = jax.vmap(lambda device: parallel.route_to_copies(routing, copies, device, node=2).indices)
        return each(jnp.arange(6))[:, :, 0]

    to = [
        [np.bincount(row // 2, minlength=6).tolist() for row in np.asarray(indices(c))] for c in (near, far)
    ]
    assert to[0][0] == [12, 0, 0, 0, 0, 0]
    assert to[0][1] == [0, 12, 0, 0, 0, 0]
    assert to[0][2] == [0, 0, 0, 12, 0, 0]
    assert to[0][5] == [0, 0, 0, 0, 12, 0]
    assert to[1][5] == [4, 4, 0, 4, 0, 0]


MESH = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))


def trace(experts=8, copies=(4, 2), **options):
    def run(x, w):
        routing = moe.softmax_top_k(jnp.zeros((8, experts)), 2)
        chosen = jnp.zeros(copies, jnp.int32)
        options_ = {"axis_name": "data"} | options
        return parallel.expert_parallel_with_copies(x, routing, lambda w, x, n: x, w, chosen, **options_)

    split = P("data")
    run = jax.shard_map(run, mesh=MESH, in_specs=(split, split), out_specs=(split, P()), check_vma=False)
    return jax.eval_shape(run, jnp.ones((32, 3)), jnp.ones((8, 3)))


def test_bad_input_is_named():
    choose = moe.expert_choice(jnp.zeros((4, 4)), capacity=1)
    load = jnp.ones(6)
    cases = {
        r"copies: got \[3, 2\]; expected a row for each of 4": lambda: trace(copies=(3, 2)),
        r"routing: got 6 experts; expected a multiple of 4": lambda: trace(experts=6),
        r"params: got \[2, 3\]; expected 4 experts in front": lambda: trace(experts=16),
        r"node: got 3; expected a divisor of 4": lambda: trace(node=3),
        r"per_pair: got 0; expected at least 1": lambda: trace(per_pair=0),
        r"slots: got 0; expected at least 1": lambda: parallel.plan_placement(load, devices=2, slots=0),
        r"load: got 6 experts; expected a multiple of 4": lambda: parallel.plan_placement(
            load, devices=4, slots=1
        ),
        r"routing: got one where experts choose": lambda: parallel.route_to_copies(
            choose, jnp.zeros((2, 1), jnp.int32), 0
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
