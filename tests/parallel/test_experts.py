"""Experts over eight devices are those of one: values, gradients, drops; bytes are those of a formula."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from frugax import layers, moe, parallel
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


@pytest.mark.parametrize("case", ["layer", "over_time", pytest.param("decoder", marks=pytest.mark.full)])
def test_layers_over_a_mesh_are_those_of_one_device(case):
    run_on_eight_devices("tests.parallel.moe_layer_calls", case)


@pytest.mark.parametrize(
    "axes",
    [
        ("data", "sequence"),
        *(pytest.param(("pipeline", a, "tensor"), marks=pytest.mark.full) for a in ("sequence", "slice")),
    ],
    ids="-".join,
)
def test_layers_over_a_mesh_draw_what_one_device_draws(axes):
    run_on_eight_devices("tests.parallel.moe_layer_calls", "draws", *axes)


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


def test_layers_say_what_they_cannot_split():
    layer, x = layers.MoE(experts=4, expert_axis="expert"), jnp.ones((1, 4, 8))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert jax.eval_shape(layer.apply, params, x).shape == x.shape  # without a mesh all experts are here
    message = r"axis_name: got \('expert',\); expected axes of the mesh in context, \('data',\)"
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))),
        pytest.raises(ValueError, match=message),
    ):
        jax.eval_shape(layer.apply, params, x)
    wrong = layer.clone(dispatch="einsum", capacity=1.0)
    with pytest.raises(ValueError, match="dispatch: got 'einsum' with expert_axis='expert'; expected"):
        jax.eval_shape(wrong.apply, params, x)


MESH = AbstractMesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def whole(tokens=8, experts=8, weights=8, routing=None, **options):
    options = {"axis_name": "data", "token_axes": ("data", "tensor")} | options
    route = routing or (lambda logits: moe.softmax_top_k(logits, 2))

    def run(x, logits, params):
        return parallel.experts_over_mesh(x, route(logits), lambda w, x, n: x, params, mesh=MESH, **options)

    params = {"w": jnp.ones((weights, 3, 3))}
    return jax.eval_shape(run, jnp.ones((tokens, 3)), jnp.ones((tokens, experts)), params)


def part(routing, tokens=8, experts=8):
    def run(x, w):
        chosen = routing(jnp.zeros((tokens, experts)))
        return parallel.expert_parallel(x, chosen, lambda w, x, n: x, w, axis_name="data")

    split = P("data")
    run = jax.shard_map(run, mesh=MESH, in_specs=(split, split), out_specs=(split, P()), check_vma=False)
    return jax.eval_shape(run, jnp.ones((32, 3)), jnp.ones((8, 3)))


def first(logits):
    return moe.softmax_top_k(logits, 1)


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input_is_named():
    cases = {
        r"routing: got 6 experts; expected a multiple of 4": lambda: whole(experts=6),
        r"params\['w'\]: got \[4, 3, 3\]; expected 8 experts in front": lambda: whole(weights=4),
        r"x: got 12 tokens; expected a multiple of 8": lambda: whole(tokens=12),
        r"token_axes: got \('data', 'expert'\); expected axes of the mesh": lambda: whole(
            token_axes=("data", "expert")
        ),
        r"axis_name: got \('data',\); expected axes that": lambda: whole(token_axes=("tensor",)),
        r"axis_name: got \('expert',\); expected axes of": lambda: whole(axis_name="expert", token_axes=None),
        r"routing: got one where experts choose": lambda: whole(
            routing=lambda logits: moe.expert_choice(logits, capacity=2)
        ),
        r"routing: got SoftRouting; expected a Routing to": lambda: whole(
            routing=lambda logits: moe.soft_route(logits[..., None])
        ),
        r"capacity: got 0, 0 tokens an expert": lambda: whole(capacity=0),
        r"max_rows: got 0; expected at least 1": lambda: whole(max_rows=0),
        r"transport: got 'fast'; expected None or one of": lambda: whole(transport="fast"),
        r"routing: got 6 experts; expected a multiple of 4, the devices": lambda: part(first, experts=6),
        r"params: got \[2, 3\]; expected 4 experts in front, of 16": lambda: part(first, experts=16),
        r"x: got \[8, 3\]; expected the 7 tokens that were routed": lambda: part(first, tokens=7),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_experts_may_choose():
    """Where experts choose among a device's tokens, shapes are those of tokens."""
    y, load = part(lambda logits: moe.expert_choice(logits, capacity=3))
    assert (y.shape, load.tokens.shape) == ((32, 3), (8,))
