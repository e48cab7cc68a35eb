"""Padded, packed and reversed rows of every mixer: as token by token, and the two-way wrapper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close

from .mixers import MIXERS, WIDTH, calls, make

LENGTHS = np.array([7, 5])
# By default one mixer for each way to keep a state; the others call the same operations alike.
KEPT = (
    "GatedLinearAttention-conv",
    "RWKV6",
    "Retention",
    "FlashRNN-slstm",
    "SlidingWindowAttention",
    "MLGRU",
)
EACH = [
    pytest.param(
        name, marks=[pytest.mark.xdist_group(f"mixer {name}"), *([] if name in KEPT else [pytest.mark.full])]
    )
    for name in MIXERS
]


def steps(mine, x, starts):
    """Return y [B, T, D] of a call token by token, and the state after 0, 1, ... T tokens."""
    states, y = [mine.nothing_read], []
    for t in range(x.shape[1]):
        out, state = mine.step(x[:, t], states[-1], starts[:, t])
        y.append(out)
        states.append(state)
    return np.stack(y, axis=1), states


def of_row(states, b: int, t: int):
    """Return row b's state after t tokens."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[b], states[t])


def stack(trees):
    """Return the tree of stacked arrays."""
    return jax.tree.map(lambda *x: np.stack(x), *trees)


@pytest.mark.nan
@pytest.mark.parametrize("name", EACH)
def test_rows_are_read_token_by_token(name):
    """Both rows are padded with NaN past their ends; documents 0 and 1 of each are told apart."""
    with jax.enable_x64(True):
        mine = calls(name)
        module, ids, x = make(name)[0], mine.ids, mine.now
        past = np.arange(x.shape[1]) >= LENGTHS[:, None]
        spoiled = np.where(past[..., None], np.nan, x)

        @jax.jit
        def run(variables, x):
            how = {"lengths": jnp.asarray(LENGTHS)}
            return (
                module.apply(variables, x, segment_ids=ids, segment_states=2, **how),
                module.apply(variables, x, segment_ids=ids, reverse=True, **how),
            )

        (y, state), (back_y, back_state) = run(mine.variables, spoiled)

        want, states = steps(mine, x, mine.starts())
        assert_close(y, np.where(past[..., None], 0, want), "float64", name="y")
        ends = [[2, 3], [5, 5]]  # row 1 has one document before its end
        both = (0, 0, 1), (0, 1, 0)
        got = jax.tree.map(lambda leaf: np.asarray(leaf)[both], state)
        want_states = stack([of_row(states, b, ends[b][n]) for b, n in zip(*both, strict=True)])
        assert_close(got, want_states, "float64", name="state")
        assert all(not np.asarray(leaf)[1, 1].any() for leaf in jax.tree.leaves(state))

        order = np.array([[*range(7)][::-1], [4, 3, 2, 1, 0, 5, 6]])
        turned = np.take_along_axis(np.asarray(x), order[..., None], axis=1)
        turned_ids = np.take_along_axis(np.asarray(ids), order, axis=1)
        starts = jnp.asarray(np.pad(turned_ids[:, 1:] != turned_ids[:, :-1], ((0, 0), (1, 0))))
        want, states = steps(mine, turned, starts)
        want = np.take_along_axis(want, order[..., None], axis=1)
        assert_close(back_y, np.where(past[..., None], 0, want), "float64", name="reversed y")
        want_states = stack([of_row(states, b, LENGTHS[b]) for b in (0, 1)])
        assert_close(back_state, want_states, "float64", name="reversed state")


def test_states_of_documents_read_backwards_are_refused():
    module, variables, x = make("MLGRU", dtype=jnp.float32)
    with pytest.raises(ValueError, match="segment_states: got 2 with reverse=True; expected None"):
        module.apply(variables, x, segment_states=2, reverse=True)


@pytest.mark.parametrize("shared", ["projections", "all", "none"])
def test_bidirectional_is_two_mixers(shared):
    """By hand: one mixer on x and another on x turned, with the first's matrices if they are shared."""
    mixer = frugax.layers.MLGRU()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, WIDTH)).astype(np.float32)
    ids = np.array([[0, 0, 1, 1, 1], [2, 2, 2, 2, 3]])
    layer = frugax.layers.Bidirectional(mixer, shared)
    shapes = jax.eval_shape(layer.init, jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda p: (0.4 * rng.standard_normal(p.shape)).astype(p.dtype), shapes)
    y = jax.jit(layer.apply)({"params": params}, x, segment_ids=ids)

    ahead = params["forward"]
    back = {
        "projections": lambda: ahead | {"norm": params["backward"]["norm"]},
        "all": lambda: ahead,
        "none": lambda: params["backward"],
    }[shared]()
    apply = jax.jit(lambda params, x, ids: mixer.apply({"params": params}, x, segment_ids=ids)[0])
    turned = np.asarray(apply(back, x[:, ::-1], ids[:, ::-1]))
    assert_close(y, np.asarray(apply(ahead, x, ids)) + turned[:, ::-1], "float32")


def test_bidirectional_names_what_may_be_shared():
    layer = frugax.layers.Bidirectional(frugax.layers.MLGRU(), "some")
    with pytest.raises(ValueError, match="shared: got 'some'; expected one of projections, all, none"):
        layer.init(jax.random.key(0), jnp.ones((1, 2, WIDTH)))
