"""Run by test_messages.py on eight devices: ways of `tensor_messages`, against one device and formulas."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import frugax
from tests.errors import bound, error
from tests.parallel.cover_calls import model, one_device, steps
from tests.parallel.steps import compile_step
from tests.parallel.volume_calls import BLOCK

MESHES = (
    dict(data=2, tensor=4, tensor_messages="rings"),
    dict(data=4, tensor=2, tensor_messages="rings"),
    dict(fsdp=2, sequence=2, tensor=2, zero=3, tensor_messages="rings"),
    dict(pipeline=2, data=2, tensor=2, tensor_messages="rings"),
)


def equal(mixer: str):
    """The loss and each gradient of a step of a mixer and GLU, to 1e-5 or what rounding does to one."""
    for parts in (1, 2):
        one, limits = one_device(mixer, False, parts)
        for mesh in (mesh for mesh in MESHES if (parts == 2) == ("pipeline" in mesh)):
            (found,) = steps(model(mixer, ""), optax.sgd(1.0), 0, parts=parts, **mesh)
            np.testing.assert_allclose(found.loss, one.loss, rtol=1e-5)
            grads = map(jax.tree.leaves, (found.grads, one.grads))
            for got, want, limit in zip(*grads, limits, strict=True):
                off = error(got, want) if np.any(want) else np.abs(got).max()
                assert off <= limit, (mesh, off, limit)


def sent():
    """In layers only pieces travel beside params: eight rings a layer, forward and backward, each of which
    sends its activations to all but the device that they are on. Sums would send as much."""
    sizes = dict(data=2, tensor=4, rows=8, time=128, width=32, repeats=2)
    x = 8 // 2 * 128 * 32 * 4
    inside = {
        way: [
            c
            for c in compile_step(BLOCK, tensor_messages=way, **sizes).collectives
            if c.axes == ("tensor",) and c.times == 2
        ]
        for way in ("sums", "rings")
    }
    half = x // 4 // 2  # of a device's tokens: each half goes its way round; params are less
    large = [c for c in inside["rings"] if c.kind != "collective-permute" and c.payload_bytes >= half]
    assert not large, large
    pieces = [c.wire_bytes for c in inside["rings"] if c.payload_bytes >= half]
    assert pieces == [half] * (8 * 3 * 2), pieces
    whole = [c.wire_bytes for c in inside["sums"] if c.kind == "all-reduce"]
    assert sum(whole) == sum(pieces), (whole, pieces)


def left():
    """The compiler has what rings can't split: tokens or columns that don't divide, and codes."""
    mesh = frugax.parallel.make_mesh(data=2, tensor=4)

    def compare(layer, time, *, rings):
        x = jax.random.normal(jax.random.key(0), (2, time, 16))
        params = layer.init(jax.random.key(1), x)
        want = jax.tree.leaves(jax.jit(layer.apply)(params, x))
        with jax.set_mesh(mesh), frugax.parallel.tensor_messages("rings"):
            program = jax.jit(layer.apply).lower(params, x).compile()
        assert ("collective-permute" in program.as_text()) == rings, (layer, time)
        for got, wanted in zip(jax.tree.leaves(program(params, x)), want, strict=True):
            assert error(got, wanted) < 8 * bound("float32"), (layer, time)

    compare(frugax.layers.Dense(24), 8, rings=True)
    compare(frugax.layers.Dense(24, parts=(18, 6)), 8, rings=False)
    compare(frugax.layers.Dense(24, parts=(16, 2, 6)), 8, rings=True)
    compare(frugax.layers.Dense(24), 6, rings=False)
    compare(frugax.layers.BitLinear(24), 8, rings=False)
    way = frugax.parallel.tensor_messages
    with jax.set_mesh(mesh):  # a program made for one way does not serve another
        place = jax.jit(frugax.parallel.place_activations)
        shapes = []
        for name in ("sums", "rings"):
            with way(name):
                y = place(jnp.ones((2, 8, 4)))
                shapes.append(y.sharding.shard_shape(y.shape))
    assert shapes == [(1, 8, 4), (1, 2, 4)], shapes


def narrow():
    """In two bytes, under strict promotion: sums of each product in float32, as the compiler's are."""
    mesh = frugax.parallel.make_mesh(data=2, tensor=4)
    for dtype in (jnp.bfloat16, jnp.float16):
        layer = nn.Sequential([frugax.layers.MLP(2, dtype=dtype, param_dtype=dtype, name="channel")])
        x = jax.random.normal(jax.random.key(0), (2, 8, 16)).astype(dtype)
        params = layer.init(jax.random.key(1), x)
        want = layer.apply(jax.tree.map(lambda w: w.astype(jnp.float32), params), x.astype(jnp.float32))

        def loss(params, x, layer=layer):
            return layer.apply(params, x).astype(jnp.float32).sum()

        rings = frugax.parallel.tensor_messages("rings")
        with jax.numpy_dtype_promotion("strict"), jax.set_mesh(mesh), rings:
            program = jax.jit(layer.apply).lower(params, x).compile()
            grads = jax.jit(jax.grad(loss))(params, x)
        assert "collective-permute" in program.as_text()
        assert error(program(params, x), want) < 4 * bound(jnp.dtype(dtype).name)
        assert all(np.any(np.asarray(g, np.float32)) for g in jax.tree.leaves(grads))


if __name__ == "__main__":
    {"equal": equal, "sent": sent, "left": left, "narrow": narrow}[sys.argv[1]](*sys.argv[2:])
