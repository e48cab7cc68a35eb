"""Properties of every sequence mixer: one call serves training, prefill, decoding and packed rows."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close

from ..calls import floats
from .mixers import MIXERS, TIME, VARIANTS, WIDTH, calls, make, together, whole

# Mixers of sums that a norm or a quotient follows.
LINEAR = [
    "LinearAttention",
    "LightningAttention",
    "Retention",
    "GatedLinearAttention",
    "HGRN2",
    "RWKV5",
    "RWKV6",
]

# Chunks of linear attention let a NaN reach the tokens before it in its chunk.
NAN_GOES_BACK = {*LINEAR, "Based", "Mamba2"}


@together()
def test_whole_is_token_by_token(name):
    with jax.enable_x64(True):
        mine = calls(name)
        none = np.zeros(mine.ids.shape, bool)
        out, grads = mine.token_by_token(mine.now, mine.nothing_read, none, mine.cotangents())
        got, got_grads = mine.whole(mine.now)
        assert_close(got, out, "float64", name="whole")
        assert_close(got_grads[:2], grads[:2], "float64", name="gradients")


@together(full=VARIANTS)
def test_packed_rows_that_go_on_are_token_by_token(name):
    """A state and several documents: (3 +) 2, 1 and 4 tokens in row 0, (3 +) 5 and 2 in row 1."""
    with jax.enable_x64(True):
        mine = calls(name)
        state = mine.before()
        want = mine.token_by_token(mine.now, state, mine.starts(), mine.cotangents())
        assert_close(mine.packed(mine.now, state), want, "float64", name="packed")


@pytest.mark.nan
@together(full=VARIANTS)
def test_outputs_do_not_see_what_comes_later(name):
    """The same bits, whatever stands at token 4 and after: other values, or NaN."""
    with jax.enable_x64(True):
        mine = calls(name)
        for run in (mine.whole, lambda x: mine.packed(x, mine.nothing_read)):
            (y, _), _ = run(mine.now)
            for later in (-3.0, jnp.nan)[: 1 if MIXERS[name][0] in NAN_GOES_BACK else 2]:
                changed = np.array(mine.now)
                changed[:, 4:] *= later
                (other, _), _ = run(changed)
                assert (np.asarray(other)[:, :4] == np.asarray(y)[:, :4]).all()


@pytest.mark.nan
@together(full=VARIANTS)
def test_documents_do_not_see_each_other(name):
    """Another value or a NaN in one: the others' outputs, gradients and the last state are the same bits."""
    with jax.enable_x64(True):
        mine = calls(name)
        of_y, of_state = mine.cotangents()
        bad = np.zeros((2, TIME), bool)
        bad[0, 2] = bad[1, :5] = True
        cotangents = np.where(bad[..., None], 0, of_y), of_state
        (y, state), (_, (of_x,), _) = mine.packed(mine.now, mine.nothing_read, cotangents)
        for other in (-3.0, jnp.nan):
            spoiled = np.array(mine.now)
            spoiled[[0, 1], [2, 3]] *= other
            got, (_, (of_spoiled,), _) = mine.packed(spoiled, mine.nothing_read, cotangents)
            assert (np.asarray(got[0])[~bad] == np.asarray(y)[~bad]).all()
            assert (np.asarray(of_spoiled)[~bad] == np.asarray(of_x)[~bad]).all()
            for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(state), strict=True):
                assert (np.asarray(a) == np.asarray(b)).all()


@together()
def test_extreme_inputs_have_finite_outputs_and_gradients(name):
    """Gates that are open or closed to the last bit, either way."""
    with jax.enable_x64(True):
        mine = calls(name)
        for size in (1e2, 1e5):
            out = mine.whole(size * mine.now)
            assert all(np.isfinite(a).all() for a in floats(out)), size


@together(full=VARIANTS)
def test_half_precision_in_half_precision_out(name):
    module, variables, x = make(name, dtype=jnp.float32, time=3 + TIME)
    y, state = jax.jit(module.apply)(variables, x[:, 3:].astype(jnp.bfloat16))
    assert jax.eval_shape(module.apply, variables, x)[0].dtype == jnp.float32
    assert y.dtype == jnp.bfloat16
    # A dozen roundings in a row: x, the projections, q and k, the output, norm and gate, the last product.
    # Each is half a unit at most, and their squares add up: to two units, and another for slopes above one.
    assert_close(y, whole(name)[2], jnp.bfloat16, times=3)
    for leaf in jax.tree.leaves(state):
        assert leaf.shape[0] == 2, "every leaf of a state has the batch in front"
    forced = type(module)(**{**MIXERS[name][1], "dtype": jnp.bfloat16})
    assert jax.eval_shape(forced.apply, variables, x)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "name",
    [
        name if name == "LinearAttention-elu+1" else pytest.param(name, marks=pytest.mark.full)
        for name, (class_name, _) in MIXERS.items()
        if class_name in {*LINEAR, "Based", "Mamba2"} and name != "LinearAttention-sum"
    ],
)
def test_sums_beyond_the_range_of_float16(name):
    """Sums over 200 tokens of large products: a norm or a quotient brings them back into float16's range."""
    module, variables, x = make(name, dtype=jnp.float32, time=200)
    x = (50 + 30 * x).astype(jnp.float16)
    apply = jax.jit(module.apply)
    y, _ = apply(variables, x)
    assert y.dtype == jnp.float16
    # A logit of Based's window or a step of Mamba-2's moves by its size times its rounding: by some units.
    times = 8 if name in ("Based", "Mamba2") else 2
    assert_close(y, apply(variables, x.astype(jnp.float32))[0], jnp.float16, times=times)


@pytest.mark.full
@pytest.mark.parametrize("name", MIXERS)
def test_long_rows_in_pieces(name):
    """Rows longer than any chunk of the kernels: whole is in pieces is a scan over tokens, gradients too."""
    T, cut = 150, 77

    def pieces(variables, x):
        first, state = module.apply(variables, x[:, :cut])
        second, state = module.apply(variables, x[:, cut:], state=state)
        return jnp.concatenate([first, second], axis=1), state

    def tokens(variables, x):
        y, state = module.apply(variables, x[:, :1])

        def step(state, x_BD):
            y, state = module.apply(variables, x_BD[:, None], state=state)
            return state, y[:, 0]

        state, rest = jax.lax.scan(step, state, jnp.moveaxis(x[:, 1:], 1, 0))
        return jnp.concatenate([y, jnp.moveaxis(rest, 0, 1)], axis=1), state

    def packed(variables, x):
        ids = jnp.array([np.repeat([7, 2, 7], (70, 1, T - 71)), np.repeat([0, 1, 0], (9, 100, T - 109))])
        return module.apply(variables, x, segment_ids=ids)[0]

    def separate(variables, x):
        rows = [
            [module.apply(variables, x[row : row + 1, a:b])[0] for a, b in itertools.pairwise(ends)]
            for row, ends in enumerate([(0, 70, 71, T), (0, 9, 109, T)])
        ]
        return jnp.concatenate([jnp.concatenate(row, axis=1) for row in rows])

    def with_gradient(run):
        def loss(variables, x):
            out = run(variables, x)
            rng = np.random.default_rng(2)
            return sum(
                jnp.vdot(a, jnp.asarray(rng.standard_normal(a.shape), a.dtype)) for a in floats(out)
            ), out

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables, x)

    with jax.enable_x64(True):
        module, variables, x = make(name, time=T)
        want = with_gradient(module.apply)
        for run in (pieces, tokens):
            assert_close(with_gradient(run), want, "float64", name=run.__name__)
        assert_close(with_gradient(packed), with_gradient(separate), "float64", name="packed")


@pytest.mark.parametrize("name", ["GatedLinearAttention-conv", "MLGRU"])  # each kernel once
def test_forward_mode_with_xla(name):
    with jax.enable_x64(True):
        module, variables, x = make(name, time=5, backend="xla")

        def loss(x):
            return jnp.sum(jnp.sin(module.apply(variables, x)[0]))

        tangent = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        _, forward = jax.jit(lambda x, t: jax.jvp(loss, (x,), (t,)))(x, tangent)
        assert_close(forward, jnp.vdot(jax.jit(jax.grad(loss))(x), tangent), jnp.float64)


class OtherState(NamedTuple):
    """The state of no mixer."""

    memory: jax.Array


@pytest.mark.parametrize(
    "annotation",
    [list[OtherState], tuple[OtherState, OtherState], OtherState | jax.Array | None, "OtherState"],
)
def test_a_mixer_of_ones_own_may_say_anything_of_its_state(annotation):
    class Mine(frugax.layers.Mixer):
        def mix(self, x, state: annotation, rows):
            return x, state

    x = jnp.ones((1, 2, WIDTH), jnp.float32)
    for state in ([OtherState(x)], (OtherState(x),) * 2, x):
        assert Mine().apply({}, x, state=state)[1] is state


@pytest.mark.parametrize("name", sorted({class_name for class_name, _ in MIXERS.values()}))
def test_inputs_that_cannot_be_right(name):
    module = getattr(frugax.layers, name)(
        **next(arguments for class_name, arguments in MIXERS.values() if class_name == name)
    )
    for x, message in [
        (jnp.ones((3, WIDTH), jnp.float32), r"x: got float32\[3, 8\]"),
        (jnp.ones((2, 0, WIDTH), jnp.float32), r"x: got float32\[2, 0, 8\]"),
        (jnp.ones((2, 3, WIDTH), jnp.int32), r"x: got int32\[2, 3, 8\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.init(jax.random.key(0), x)
    for ids in (jnp.ones((2, 4), jnp.int32), jnp.ones((2, 3))):
        with pytest.raises(ValueError, match=r"segment_ids: got .* expected integers \[2, 3\]"):
            module.init(jax.random.key(0), jnp.ones((2, 3, WIDTH)), segment_ids=ids)
    with pytest.raises(ValueError, match=r"state: got float32\[1, 2\]; expected every leaf \[2, \.\.\.\]"):
        module.init(jax.random.key(0), jnp.ones((2, 3, WIDTH)), state=jnp.ones((1, 2), jnp.float32))
    with pytest.raises(ValueError, match=r"state: got OtherState; expected \w+State, as \w+ returns it"):
        module.init(jax.random.key(0), jnp.ones((2, 3, WIDTH)), state=OtherState(jnp.ones((2, 2))))
    for heads in (3, 0) if hasattr(module, "heads") else ():
        match = f"heads: got {heads}; expected a number >= 1 that divides width"
        with pytest.raises(ValueError, match=match):
            getattr(frugax.layers, name)(heads=heads).init(jax.random.key(0), jnp.ones((1, 2, WIDTH)))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("LinearAttention", {"feature_map": "cosine"}, "feature_map: got 'cosine'; expected one of elu"),
        ("SlidingWindowAttention", {"window": 0}, "window: got 0"),
        ("Retention", {"heads": 8}, "heads of 1 channels; expected an even number"),
        ("GatedConvolution", {"width": 0}, "width: got 0"),
        ("GatedConvolution", {"expand": 0}, "expand: got 0"),
        ("MLGRU", {"backend": "cuda"}, "backend: got 'cuda'"),
    ],
)
def test_attributes_that_cannot_be_right(name, arguments, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        getattr(frugax.layers, name)(**arguments).init(jax.random.key(0), jnp.ones((1, 2, WIDTH)))
