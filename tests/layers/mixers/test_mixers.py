"""What holds for every sequence mixer: one call serves training, prefill, decoding and packed rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close

from .mixers import MIXERS, VARIANTS, WIDTH, make

every_mixer = pytest.mark.parametrize("name", MIXERS)


# A mixer's tests run in one worker, which compiles `whole` once for them.
def together(*, full=()):
    def marks(name):
        return [pytest.mark.xdist_group(f"mixer {name}"), *([pytest.mark.full] if name in full else [])]

    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in MIXERS])


def dtype_of(name):
    """float64; but float32 where jax.nn.dot_product_attention has its weights in that whatever it gets."""
    return jnp.float32 if MIXERS[name][0] in ("SlidingWindowAttention", "Based") else jnp.float64


def in_chunks(module, variables, x, lengths, state=None, **arguments):
    outputs, start = [], 0
    for length in lengths:
        piece = {key: a[:, start : start + length] for key, a in arguments.items()}
        y, state = module.apply(variables, x[:, start : start + length], state=state, **piece)
        outputs.append(y)
        start += length
    assert start == x.shape[1]
    return jnp.concatenate(outputs, axis=1), state


def by_token(module, variables, x):
    """The first token without a state, the others in a scan that carries it."""
    y, state = module.apply(variables, x[:, :1])

    def step(state, x_BD):
        y, state = module.apply(variables, x_BD[:, None], state=state)
        return state, y[:, 0]

    state, rest = jax.lax.scan(step, state, jnp.moveaxis(x[:, 1:], 1, 0))
    return jnp.concatenate([y, jnp.moveaxis(rest, 0, 1)], axis=1), state


def value_and_grads(run, variables, x):
    """(y, state) and the gradient of their random combination in the variables and in x."""

    def loss(variables, x):
        out = run(variables, x)
        rng = np.random.default_rng(2)
        floats = [a for a in jax.tree.leaves(out) if jnp.issubdtype(a.dtype, jnp.floating)]
        return sum(jnp.vdot(a, jnp.asarray(rng.standard_normal(a.shape), a.dtype)) for a in floats), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables, x)
    return {"out": out, "grads": grads}


@functools.cache
def whole_call(name):
    """One call with all tokens: (y, state) and gradients, as numpy arrays, in float64."""
    with jax.enable_x64(True):
        module, variables, x = make(name)
        return jax.tree.map(np.asarray, value_and_grads(module.apply, variables, x))


@together()
def test_whole_is_chunked_is_token_by_token(name):
    whole = whole_call(name)
    with jax.enable_x64(True):
        module, variables, x = make(name)
        chunks = value_and_grads(lambda v, x: in_chunks(module, v, x, (8, 5)), variables, x)
        tokens = value_and_grads(lambda v, x: by_token(module, v, x), variables, x)
        assert_close(chunks, whole, dtype_of(name), name="chunks")
        assert_close(tokens, whole, dtype_of(name), name="tokens")


@together(full=VARIANTS)
def test_packed_is_separate(name):
    # (row, start) of the documents of each length: row 0 holds 3 + 1 + 9 tokens, row 1 holds 9 + 3 + 1.
    documents = {3: [(0, 0), (1, 9)], 1: [(0, 3), (1, 12)], 9: [(0, 4), (1, 0)]}
    ids = jnp.array([np.repeat([7, 2, 7], (3, 1, 9)), np.repeat([0, 1, 0], (9, 3, 1))])

    def separate(variables, x):
        rows = [{}, {}]
        for length, places in documents.items():
            alone = jnp.stack([x[row, start : start + length] for row, start in places])
            y, _ = module.apply(variables, alone)
            for y_TD, (row, start) in zip(y, places, strict=True):
                rows[row][start] = y_TD
        return jnp.stack([jnp.concatenate([row[start] for start in sorted(row)]) for row in rows])

    def packed(variables, x):
        return module.apply(variables, x, segment_ids=ids)[0]

    with jax.enable_x64(True):
        module, variables, x = make(name)
        want = value_and_grads(separate, variables, x)
        assert_close(value_and_grads(packed, variables, x), want, dtype_of(name), name="packed")
        # The cut after 6 tokens is inside a document in both rows, in row 0 after two others.
        chunks, _ = jax.jit(lambda v, x: in_chunks(module, v, x, (6, 7), segment_ids=ids))(variables, x)
        assert_close(chunks, want["out"], dtype_of(name), name="chunks")


@together(full=VARIANTS)
def test_half_precision_in_half_precision_out(name):
    module, variables, x = make(name, dtype=jnp.float32)
    want, _ = whole_call(name)["out"]
    y, state = jax.jit(module.apply)(variables, x.astype(jnp.bfloat16))
    assert jax.eval_shape(module.apply, variables, x)[0].dtype == jnp.float32
    assert y.dtype == jnp.bfloat16
    # A dozen roundings in a row: x, the projections, q and k, the output, norm and gate, the last product.
    assert_close(y, want, jnp.bfloat16, times=12)
    for leaf in jax.tree.leaves(state):
        assert leaf.shape[0] == 2, "every leaf of a state has the batch in front"
    forced = type(module)(**{**MIXERS[name][1], "dtype": jnp.bfloat16})
    assert jax.eval_shape(forced.apply, variables, x)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["GatedLinearAttention-conv", "MLGRU"])  # each kernel once
def test_forward_mode_with_xla(name):
    with jax.enable_x64(True):
        module, variables, x = make(name, time=5, backend="xla")

        def loss(x):
            return jnp.sum(jnp.sin(module.apply(variables, x)[0]))

        tangent = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        _, forward = jax.jit(lambda x, t: jax.jvp(loss, (x,), (t,)))(x, tangent)
        assert_close(forward, jnp.vdot(jax.jit(jax.grad(loss))(x), tangent), jnp.float64)


@every_mixer
@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (jnp.ones((3, WIDTH)), r"x: got float32\[3, 12\]"),
        (jnp.ones((2, 0, WIDTH)), r"x: got float32\[2, 0, 12\]"),
        (jnp.ones((2, 3, WIDTH), jnp.int32), r"x: got int32\[2, 3, 12\]"),
    ],
)
def test_inputs_that_cannot_be_right(name, x, fits):
    class_name, arguments = MIXERS[name]
    with pytest.raises(ValueError, match=fits):
        getattr(frugax.layers, class_name)(**arguments).init(jax.random.key(0), x)


@every_mixer
def test_segment_ids_that_cannot_be_right(name):
    class_name, arguments = MIXERS[name]
    module, x = getattr(frugax.layers, class_name)(**arguments), jnp.ones((2, 3, WIDTH))
    for ids in (jnp.ones((2, 4), jnp.int32), jnp.ones((2, 3))):
        with pytest.raises(ValueError, match=r"segment_ids: got .* expected integers \[2, 3\]"):
            module.init(jax.random.key(0), x, segment_ids=ids)


@pytest.mark.parametrize("name", sorted({c for c, a in MIXERS.values() if "heads" in a}))
@pytest.mark.parametrize("heads", [5, 0])
def test_heads_that_do_not_divide_the_width(name, heads):
    with pytest.raises(ValueError, match=f"heads: got {heads}; expected a number >= 1 that divides width"):
        getattr(frugax.layers, name)(heads=heads).init(jax.random.key(0), jnp.ones((1, 2, WIDTH)))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("LinearAttention", {"feature_map": "cosine"}, "feature_map: got 'cosine'; expected one of elu"),
        ("SlidingWindowAttention", {"window": 0}, "window: got 0"),
        ("Retention", {"heads": 12}, "heads of 1 channels; expected an even number"),
        ("GatedConvolution", {"width": 0}, "width: got 0"),
        ("GatedConvolution", {"expand": 0}, "expand: got 0"),
        ("MLGRU", {"backend": "cuda"}, "backend: got 'cuda'"),
    ],
)
def test_attributes_that_cannot_be_right(name, arguments, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        getattr(frugax.layers, name)(**arguments).init(jax.random.key(0), jnp.ones((1, 2, WIDTH)))
