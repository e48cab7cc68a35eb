"""Layers whose time the mesh in context splits: the numbers of one device, and no tokens gathered."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

import frugax
from experiments.configs.defaults import defaults
from experiments.trainer.parallel import make_layout
from frugax.layers.block import mixer_names
from frugax.parallel import over_time
from tests.devices import run_on_eight_devices

NO_FORM = {"FlashRNN"}
CALLS = "tests.parallel.mixer_time_calls"


def test_a_few_mixers_split_over_time_and_rows():
    names = "GatedLinearAttention,RWKV5,SlidingWindowAttention"
    run_on_eight_devices(CALLS, names, json.dumps({"data": 2, "sequence": 4}))


@pytest.mark.full
@pytest.mark.parametrize(
    "sizes",
    [{"sequence": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2}],
    ids=str,
)
@pytest.mark.parametrize("name", sorted({*mixer_names(), "RWKVChannel"} - NO_FORM))
def test_every_mixer_splits_over_time(name, sizes):
    run_on_eight_devices(CALLS, name, json.dumps(sizes))


@pytest.mark.full
def test_rows_of_windows_and_experts_may_be_padded():
    run_on_eight_devices("tests.parallel.padded_time_calls")


@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ({"data": 2, "sequence": 4}, "dense"),
        pytest.param({"fsdp": 2, "sequence": 2, "tensor": 2}, "dense", marks=pytest.mark.full),
        pytest.param({"expert": 2, "sequence": 4}, "experts", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_steps_of_the_trainer_are_those_of_one_device(sizes, block):
    run_on_eight_devices("tests.parallel.layout_calls", "adamw", json.dumps(sizes), block)


def test_rows_that_devices_do_not_divide_are_named():
    config = defaults()
    config.mesh.data, config.mesh.sequence, config.data.sequence_length = 1, 2, 511
    devices = jax.devices()[:1] * 2  # no program runs on them
    with pytest.raises(
        ValueError, match=r"data.sequence_length: got 511; expected a multiple of mesh.sequence=2"
    ):
        make_layout(config, devices)


def test_without_a_sequence_axis_an_operation_is_its_kernel():
    q, x, A = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 8, 4)), -jnp.ones((4, 2))
    calls = {
        "linear_attention": (q, q, q),
        "linear_recurrence": (x, x),
        "causal_conv1d": (x, x[0, :3]),
        "selective_scan": (x, x, A, x[..., :2], x[..., :2]),
        "ssd": (q, q[..., 0], A[:2, 0], q, q),
        "lmu": (x, 4, 20.0),
        "trapezoidal_ssd": (q, q[..., 0], -q[..., 0], q, q, q[..., 0]),
    }

    def program(f, args):  # without checkify's running numbers
        return re.sub(r"\d+:i(32|64)\[\] -1(:i64\[\])?", "", str(jax.make_jaxpr(lambda: f(*args))()))

    for name, args in calls.items():
        ours, kernel = (getattr(place, name) for place in (over_time, frugax.kernels))
        assert program(ours, args) == program(kernel, args), name
        with jax.set_mesh(frugax.parallel.make_mesh(devices=jax.devices()[:1])):
            assert program(ours, args) == program(kernel, args), name


def test_what_has_no_form_over_time_says_so():
    x = jnp.ones((2, 8, 16))
    mesh = jax.sharding.AbstractMesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))

    def trace(mixer, *, x=x, **how):
        params = jax.eval_shape(mixer.init, jax.random.key(0), x[:, :2])
        with jax.sharding.use_abstract_mesh(mesh):
            jax.eval_shape(lambda p: mixer.apply(p, x, **how), params)

    with pytest.raises(
        ValueError, match=r"FlashRNN: got time split over 2 devices.*expected whole rows.*'lstm'"
    ):
        trace(frugax.layers.FlashRNN())
    with pytest.raises(ValueError, match=r"lif: got time split over 2 devices.*expected whole rows"):
        trace(frugax.layers.LMU(order=4, spiking=True))
    gla, window = frugax.layers.GatedLinearAttention(), frugax.layers.SlidingWindowAttention(window=3)
    for mixer in (gla, window):
        trace(mixer, lengths=jnp.array([3, 8]), segment_states=2)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match=r"reverse: got True with time split.*expected none"),
    ):
        over_time.linear_recurrence(x, x, reverse=True)
    with pytest.raises(
        ValueError, match=r"k: got 7 tokens; expected a multiple of 2, the devices of.*'sequence'"
    ):
        trace(gla, x=x[:, :7])
