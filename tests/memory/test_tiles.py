"""Tiles of time: the numbers and gradients of the whole, with the memory of a part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import frugax
from frugax.memory import tiled, tiled_module
from tests.errors import assert_close


def cross_entropy(head, x_and_label):
    x, label = x_and_label
    logits = jnp.dot(x, head, preferred_element_type=jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]


def example(dtype, shape=(2, 11, 4), vocab=9):
    """(head, x, labels, weights), of a length that 3 tiles don't divide."""
    rng = np.random.default_rng(0)
    head, x = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((shape[-1], vocab), shape))
    labels = jnp.asarray(rng.integers(vocab, size=shape[:-1]), jnp.int32)
    return head, x, labels, jnp.asarray(rng.random(shape[:-1]), jnp.float32)


def gradients(of_losses, head, x, labels, weights):
    """The weighted losses, and their gradients to the head, which is closed over, and to x."""

    def total(head, x):
        losses = of_losses(lambda xy: cross_entropy(head, xy), (x, labels))
        return jnp.sum(losses * weights), losses

    (_, losses), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(head, x)
    return losses, grads


def in_float64(head, x, labels, weights):
    """The same by hand: d = weight * (softmax(x W) - onehot)."""
    head, x = (np.asarray(a, np.float64) for a in (head, x))
    p = np.exp(x @ head)
    p /= p.sum(-1, keepdims=True)
    hot = np.eye(head.shape[-1])[np.asarray(labels)]
    d = np.asarray(weights, np.float64)[..., None] * (p - hot)
    return -np.log((p * hot).sum(-1)), (np.einsum("btd,btv->dv", x, d), d @ head.T)


@pytest.mark.parametrize(
    "tiles", [3, pytest.param(1, marks=pytest.mark.full), pytest.param(40, marks=pytest.mark.full)]
)
def test_tiles_are_the_whole(tiles):
    """3 leave 2 places over, 40 are more than there are places; labels have no gradient, the closure has."""
    given = example(jnp.float32)
    got = jax.jit(lambda *given: gradients(lambda f, x: tiled(f, x, tiles), *given))(*given)
    assert_close(got, in_float64(*given), "float32")
    if tiles == 3:
        eager = gradients(lambda f, x: tiled(f, x, tiles), *given)
        assert_close(eager, got, "float32", name="eager")


def test_gradients_of_narrow_params_add_up_in_float32():
    """256 tiles of one place each: sums in bfloat16 would lose several per cent."""
    given = example(jnp.bfloat16, (1, 256, 4))
    got = jax.jit(lambda *given: gradients(lambda f, x: tiled(f, x, 256), *given))(*given)
    assert got[1][0].dtype == jnp.bfloat16
    assert_close(got[1], in_float64(*given)[1], "bfloat16")


@pytest.mark.full
def test_other_axes_trees_and_transformations():
    rng = np.random.default_rng(1)
    x = {"a": jnp.asarray(rng.standard_normal((5, 7)), jnp.float32), "b": jnp.arange(5)}

    def f(x):
        return {"sin": jnp.sin(x["a"]), "two": (2 * x["b"],)}

    found = tiled(f, x, 2, axis=0)
    assert_close(found["sin"], np.sin(np.asarray(x["a"], np.float64)), "float32")
    assert found["two"][0].tolist() == [0, 2, 4, 6, 8]
    many = jax.vmap(lambda a: tiled(jnp.sin, a, 3, axis=0))(x["a"])
    assert_close(many, np.sin(np.asarray(x["a"], np.float64)), "float32", name="vmap")
    in_remat = jax.checkpoint(lambda a: tiled(jnp.sin, a, 3, axis=0).sum())
    assert_close(jax.grad(in_remat)(x["a"]), np.cos(np.asarray(x["a"], np.float64)), "float32", name="remat")


def test_no_logits_and_a_tile_of_memory():
    """[N, V] stands nowhere in the program, and temporaries fall by about the number of tiles."""
    N, D, V, tiles = 512, 8, 1024, 8
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((D, V), (1, N, D), (1, N))]

    def program(tiles):
        def loss(head, x, weights):
            labels = jnp.zeros(x.shape[:2], jnp.int32)
            losses = tiled(lambda xy: cross_entropy(head, xy), (x, labels), tiles)
            return jnp.sum(losses * weights)

        f = jax.grad(loss, (0, 1))
        return str(jax.make_jaxpr(f)(*shapes)), jax.jit(f).lower(*shapes).compile()

    def is_whole(text):
        return f"{N},{V}]" in text

    def temporaries(compiled):
        return compiled.memory_analysis().temp_size_in_bytes

    (whole_text, whole), (text, in_tiles) = program(1), program(tiles)
    assert is_whole(whole_text)
    assert not is_whole(text)
    assert f"{N // tiles},{V}]" in text
    assert temporaries(whole) > 2 * 4 * N * V  # logits and their gradient
    fixed = 3 * 4 * (D * V + N * D)  # sums of gradients
    assert temporaries(in_tiles) - fixed < 1.2 * temporaries(whole) / tiles


class Two(nn.Module):
    """A GLU in tiles, if so."""

    tiles: int
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        glu = frugax.layers.GLU(expand=4, param_dtype=self.param_dtype, name="glu")
        return tiled_module(glu, x, tiles=self.tiles)


def test_a_module_in_tiles_is_the_whole():
    """Values, gradients to params and x, and the names of params; 3 tiles of 11 leave 2 over."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 11, 8)), jnp.float32)
    variables = Two(1).init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, Two(3).init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, variables)

    def run(module):
        def f(variables, x):
            y = module.apply(variables, x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(f, (0, 1), has_aux=True))(variables, x)

    assert_close(run(Two(3)), run(Two(1)), "float32")


@pytest.mark.full
def test_gradients_of_narrow_modules_add_up_in_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 256, 8)), jnp.float32)
    variables = Two(1, jnp.bfloat16).init(jax.random.key(0), x)

    def run(module, variables):
        return jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, x) ** 2)))(variables)

    want = run(Two(1), jax.tree.map(lambda p: p.astype(jnp.float32), variables))
    got = run(Two(256, jnp.bfloat16), variables)
    assert jax.tree.leaves(got)[0].dtype == jnp.bfloat16
    assert_close(got, want, "bfloat16")


def test_a_tiled_mlp_keeps_a_tile_of_hidden_values():
    """One MLP 32 times as wide: temporaries of its gradient fall by about the number of tiles."""
    x = jax.ShapeDtypeStruct((1, 1024, 16), jnp.float32)

    def temporaries(tiles):
        class Wide(nn.Module):
            @nn.compact
            def __call__(self, x):
                return tiled_module(frugax.layers.MLP(expand=32), x, tiles=tiles)

        shapes = jax.eval_shape(Wide().init, jax.random.key(0), x)
        f = jax.grad(lambda v, x: jnp.sum(Wide().apply(v, x) ** 2))
        return jax.jit(f).lower(shapes, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.25 * temporaries(1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: tiled(jnp.sin, x, 0), "tiles: got 0; expected a number >= 1"),
        (lambda x: tiled(jnp.sin, x, 2, axis=3), r"x: got \[2, 6, 4\]; expected arrays .* along axis 3"),
        (lambda x: tiled(lambda xy: xy[0], (x, x[:, 1:]), 2), r"x: got \[2, 6, 4\], \[2, 5, 4\]; expected"),
        (lambda x: tiled(lambda x: x.sum(), x, 2), r"fn: got a result of shape \[\] for a tile; expected"),
        (
            lambda x: tiled(lambda x: x[:, :1], x, 2),
            "fn: got results of 2 places; expected one for each of x's 6",
        ),
    ],
    ids=["tiles", "axis", "lengths", "sum", "part"],
)
def test_what_can_not_be_tiled_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(jnp.ones((2, 6, 4)))
