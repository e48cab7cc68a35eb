"""Logical axes of every layer's arrays, their places on a mesh, and training over eight devices."""

import json
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh

import frugax
from frugax.layers.block import CHANNELS, mixer_names
from frugax.parallel.axes import axes_of
from tests.devices import run_on_eight_devices

MIXERS = [name for name in mixer_names() if name not in CHANNELS]


def mesh(**sizes):
    return AbstractMesh(tuple(sizes.get(name, 1) for name in frugax.parallel.AXES), frugax.parallel.AXES)


@pytest.fixture(scope="module")
def params():
    """Shapes of a decoder with every mixer and every channel mixer."""
    channels = [CHANNELS[i % len(CHANNELS)] for i in range(len(MIXERS))]
    blocks = tuple(map(frugax.layers.Block, MIXERS, channels))
    model = frugax.layers.Decoder(64, 32, blocks, repeats=2, tie_embeddings=False)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]


def test_every_array_of_every_layer_has_its_meaning(params):
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes, known = axes_of(name, x.ndim)
        assert known, name
        assert len(axes) == x.ndim, name
        assert (axes[0] == "layers") == name.startswith("layers/"), name
        if name.endswith("kernel"):  # a matrix has a side by the residual stream, or by inner channels
            assert {"embed", "heads", "mlp"} & set(axes), name
    assert not axes_of("a/b/c", 2)[1]


def test_places_follow_the_rules():
    shapes = {"layers": {"block_0": {"channel": {"out": {"kernel": jnp.zeros((6, 64, 128))}}}}}
    of = lambda tree: tuple(jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "spec"))[0].spec)  # noqa: E731
    on = mesh(fsdp=2, tensor=2)
    assert of(frugax.parallel.shardings(shapes, on)) == ("pipeline", ("tensor", "fsdp"), None)
    assert of(frugax.parallel.shardings(shapes, on, zero=False)) == ("pipeline", "tensor", None)
    rules = {"mlp": None, "embed": ("fsdp", "tensor")}
    assert of(frugax.parallel.shardings(shapes, on, rules)) == (None, None, ("fsdp", "tensor"))
    assert of(frugax.parallel.shardings(shapes, mesh(fsdp=2))) == ("pipeline", "fsdp", None)
    assert "6 x 64 x 128  layers, mlp, embed  pipeline, tensor*fsdp, -" in frugax.parallel.table(shapes, on)


def test_a_state_lies_as_its_params():
    """Moments as the params; moments in a subspace and codes by the sizes that they share."""
    shapes = {"layers": {"w": jax.ShapeDtypeStruct((3, 64, 256), jnp.float32)}, "b": jnp.zeros(7)}
    on = mesh(fsdp=2)
    for optimizer in (optax.adamw(0.1), frugax.optim.galore(0.1, rank=8), frugax.optim.adamw_8bit(0.1)):
        state = jax.eval_shape(optimizer.init, shapes)
        places = frugax.parallel.state_shardings(state, shapes, on)
        spread = 0
        for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
            spread += "fsdp" in place.spec
            assert (
                not place.spec or place.spec[0] in (None, "pipeline") or x.ndim < 3
            )  # never over the layers
            assert x.size < 4096 or "fsdp" in place.spec, (x.shape, place.spec)
        assert spread >= 2


@pytest.mark.parametrize("axes", [dict(sequence=8), dict(sequence=4, tensor=2), dict(fsdp=2, sequence=4)])
def test_groups_of_codes_lie_on_as_many_devices_as_can_have_whole_ones(axes):
    """Twelve groups in a row: on four devices, where eight share the params."""
    shapes = {"out": {"kernel": jax.ShapeDtypeStruct((1024, 3072), jnp.float32)}}
    state = jax.eval_shape(frugax.optim.q_galore(0.1, rank=16).init, shapes)
    places = frugax.parallel.state_shardings(state, shapes, mesh(**axes))
    seen = 0
    for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        if x.dtype == jnp.uint8 and x.size >= 4096:
            names = [
                name for part in place.spec for name in ([part] if isinstance(part, str) else part or ())
            ]
            assert math.prod(axes.get(name, 1) for name in names) >= 4, (x.shape, place.spec)
            seen += 1
    assert seen


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(data=3), "mesh: got data=3 = 3; expected sizes that multiply to 1 devices"),
        (dict(data=0), "data: got 0; expected a number of devices, or -1"),
        (dict(fsdp=-1), "fsdp: got -1 beside data=-1"),
        (dict(tensor=2), "data: got -1 with tensor=2; expected sizes that divide 1 devices"),
    ],
)
def test_wrong_meshes_are_named(sizes, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        frugax.parallel.make_mesh(**sizes, devices=jax.devices()[:1])


def test_a_mesh_that_does_not_divide_an_array_names_it():
    shapes = {"channel": {"out": {"kernel": jnp.zeros((6, 8))}}}
    words = (
        "mesh: tensor has 4 devices; expected a divisor of 6, dimension 0 (mlp) of channel/out/kernel [6, 8]"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        frugax.parallel.shardings(shapes, mesh(tensor=4))
    with pytest.raises(ValueError, match="rules: got 'mlp': 'model'; expected axes of"):
        frugax.parallel.shardings(shapes, mesh(), {"mlp": "model"})


def test_a_mesh_of_all_kinds_trains_as_one_device_does():
    """Params in 2 x 2 parts, batch in 4: losses, params and a resumed run on other devices."""
    run_on_eight_devices(
        "tests.parallel.layout_calls", "adamw", json.dumps({"data": 2, "fsdp": 2, "tensor": 2})
    )


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["adamw", "galore", "apollo", "adamw_8bit", "muon"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_stages_of_zero_train_as_one_device_does(optimizer, zero):
    sizes = {"fsdp": 4, "tensor": 2} if zero == 3 else {"fsdp": 8}
    run_on_eight_devices("tests.parallel.layout_calls", optimizer, json.dumps(sizes | {"zero": zero}))


@pytest.mark.full
@pytest.mark.parametrize(
    "sizes", [{"expert": 8}, {"data": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}]
)
def test_experts_over_a_mesh_train_as_on_one_device(sizes):
    run_on_eight_devices("tests.parallel.layout_calls", "adamw", json.dumps(sizes), "experts")


@pytest.mark.full
def test_stages_of_zero_save_the_memory_that_they_say():
    run_on_eight_devices("tests.parallel.layout_calls", "memory")
