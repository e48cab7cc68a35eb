"""Experts over eight devices are those of one: values, gradients, drops; bytes are those of a formula."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from frugax import moe, parallel
from tests.devices import run_on_eight_devices

CASES = [
    ("inside", "coupled", "nothing"),
    ("outside", "copies", "over all"),
    ("inside", "all", "by device"),
    ("inside", "tensor and copies", "by device"),
    ("inside", "tensor and copies", "over a sequence"),
    ("inside", "copies", "nothing"),
    ("inside", "copies", "many rows"),
    ("outside", "all", "nothing"),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.full] * (i > 1), id=", ".join(c)) for i, c in enumerate(CASES)],
)
def test_experts_over_devices_are_those_of_one(case):
    run_on_eight_devices("tests.parallel.expert_calls", *case)


@pytest.mark.full
def test_a_key_drops_other_tokens():
    run_on_eight_devices("tests.parallel.expert_calls", "key")


@pytest.mark.full
def test_ragged_transport_is_the_padded_one():
    run_on_eight_devices("tests.parallel.ragged_calls")


def test_folding_over_the_tensor_axis_moves_fewer_bytes():
    """Of eight devices: experts split over four and their width over two, or experts over all eight."""
    sizes = dict(tokens=512, width=64, experts=32, k=4, capacity=64)
    coupled = parallel.expert_parallel_bytes(**sizes, devices=4, tensor=2)
    folded = parallel.expert_parallel_bytes(**sizes, devices=8)
    rows = 32 * 64 * 64 * 2  # bytes that a device sends for all experts
    assert coupled == {"all_to_all": 2 * rows * 3 // 4, "all_gather": rows, "reduce_scatter": rows}
    assert folded == {"all_to_all": 2 * rows * 7 // 8, "all_gather": 0, "reduce_scatter": 0}
    dropless = parallel.expert_parallel_bytes(512, 64, 32, 4, devices=8)
    assert dropless["all_to_all"] == 2 * 7 * 512 * 4 * 64 * 2


MESH = AbstractMesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def whole(tokens=8, experts=8, weights=8, routing=None, **options):
    options = {"axis_name": "data", "token_axes": ("data", "tensor")} | options
    routing = routing or moe.softmax_top_k(jnp.zeros((tokens, experts)), 2)
    x, params = jnp.ones((tokens, 3)), {"w": jnp.ones((weights, 3, 3))}
    return jax.eval_shape(
        lambda: parallel.experts_over_mesh(x, routing, lambda w, x, n: x, params, mesh=MESH, **options)
    )


def part(routing, **options):
    split = P("data")
    run = lambda x, w: parallel.expert_parallel(x, routing, lambda w, x, n: x, w, axis_name="data", **options)  # noqa: E731
    specs = dict(in_specs=(split, split), out_specs=(split, P()))
    return jax.eval_shape(
        jax.shard_map(run, mesh=MESH, check_vma=False, **specs), jnp.ones((32, 3)), jnp.ones((8, 3))
    )


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input_is_named():
    cases = {
        r"routing: got 6 experts; expected a multiple of 4": lambda: whole(experts=6),
        r"params\['w'\]: got \[4, 3, 3\]; expected 8 experts in front": lambda: whole(weights=4),
        r"x: got 12 tokens; expected a multiple of 8": lambda: whole(tokens=12),
        r"token_axes: got 'expert'; expected axes of the mesh": lambda: whole(token_axes=("data", "expert")),
        r"axis_name: got \('data',\); expected axes that": lambda: whole(token_axes=("tensor",)),
        r"routing: got one where experts choose": lambda: whole(
            routing=moe.expert_choice(jnp.zeros((8, 8)), capacity=2)
        ),
        r"capacity: got 0, 0 tokens an expert": lambda: whole(capacity=0),
        r"max_rows: got 0; expected at least 1": lambda: whole(max_rows=0),
        r"transport: got 'fast'; expected None or one of": lambda: whole(transport="fast"),
        r"routing: got 6 experts; expected a multiple of 4, the devices": lambda: part(
            moe.softmax_top_k(jnp.zeros((8, 6)), 1)
        ),
        r"params: got \[2, 3\]; expected 4 experts in front, of 16": lambda: part(
            moe.softmax_top_k(jnp.zeros((8, 16)), 1)
        ),
        r"x: got \[8, 3\]; expected the 7 tokens that were routed": lambda: part(
            moe.softmax_top_k(jnp.zeros((7, 8)), 1)
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_experts_may_choose():
    """Where experts choose among a device's tokens, shapes are those of tokens."""
    y, load = part(moe.expert_choice(jnp.zeros((8, 8)), capacity=3))
    assert (y.shape, load.tokens.shape) == ((32, 3), (8,))
