"""Padded, packed and reversed rows: every recurrence against a call for each document by itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import kernels
from frugax.kernels import TrapezoidalState
from tests.errors import assert_close

B, T, H, K = 3, 8, 2, 3
# Documents of two or three tokens: the separate calls are compiled for two lengths.
IDS = np.array([[0, 0, 0, 1, 1, 1, 0, 0], [5, 5, 5, 7, 7, 7, 7, 9], [2, 2, 3, 3, 3, 3, 3, 3]], np.int32)
LENGTHS = np.array([8, 5, 2], np.int32)


def arguments() -> dict:
    """Return for each operation its function, per-token arrays, and the others, all float64."""
    rng = np.random.default_rng(0)

    def f(*shape):
        return rng.standard_normal(shape)

    def decay(*shape):
        return -np.abs(f(*shape))

    qkv = dict(q=f(B, T, H, K), k=f(B, T, 1, K), v=f(B, T, H, 4))
    scan = dict(x=f(B, T, K), dt=f(B, T, K), B=f(B, T, 2), C=f(B, T, 2), z=f(B, T, K))
    ssd = dict(x=f(B, T, 4, K), dt=f(B, T, 4), B=f(B, T, 2, 3), C=f(B, T, 2, 3), z=f(B, T, 4, K))

    def rnn(cell, gates, states):
        rest = dict(recurrent=f(H, gates, K, K), initial_state=f(B, states, H, K))
        if cell == "slstm":
            rest["initial_state"] = np.abs(rest["initial_state"])  # n is above 0
        return lambda **a: kernels.rnn(cell=cell, **a), dict(gates=f(B, T, H, gates, K)), rest

    def mamba(**a):
        return kernels.selective_scan(dt_softplus=True, **a)

    def linear(**a):
        return kernels.linear_attention(**a)

    three = {n: ssd[n] for n in ("x", "B", "C")} | dict(dt=np.abs(f(B, T, 4)), A=decay(B, T, 4))
    state = f(B, H, K, 4)
    return {
        "linear_attention": (linear, qkv, dict(initial_state=state)),
        "fixed decay": (linear, qkv, dict(log_decay=decay(H), initial_state=state)),
        "decay a channel": (
            linear, qkv | dict(log_decay=decay(B, T, H, K)), dict(bonus=f(H, K), initial_state=state),
        ),
        "selective_scan": (
            mamba, scan, dict(A=decay(K, 2), D=f(K), dt_bias=f(K), initial_state=f(B, K, 2)),
        ),
        "ssd": (
            lambda **a: kernels.ssd(dt_softplus=True, **a), ssd,
            dict(A=decay(4), D=f(4), dt_bias=f(4), initial_state=f(B, 4, 3, K)),
        ),
        "trapezoidal_ssd": (
            kernels.trapezoidal_ssd, three | dict(mix=rng.random((B, T, 4))),
            dict(D=f(4), initial_state=TrapezoidalState(f(B, 4, 3, K), f(B, 2, 3), f(B, 4, K))),
        ),
        "linear_recurrence": (
            kernels.linear_recurrence, dict(a=f(B, T, K), b=f(B, T, K)), dict(initial_state=f(B, K)),
        ),
        "causal_conv1d": (
            kernels.causal_conv1d, dict(x=f(B, T, K)), dict(weight=f(4, K), initial_state=f(B, 3, K)),
        ),
        "lmu": (
            lambda **a: kernels.lmu(order=3, theta=4.0, **a), dict(u=f(B, T, K)),
            dict(initial_state=f(B, K, 3)),
        ),
        "lstm": rnn("lstm", 4, 2),
        "slstm": rnn("slstm", 4, 4),
        "gru": rnn("gru", 3, 1),
    }  # fmt: skip


OPERATIONS = arguments()


def f32(arrays: dict) -> dict:
    """Return the arrays in float32, as jax's."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)


def document_by_document(operation, tokens, rest, ids, lengths, reverse: bool, wanted: int | None):
    """Return the outputs and states that calls for each document alone give, in float64."""

    @jax.jit
    def run(tokens, rest):
        if reverse:
            tokens = {name: x[:, ::-1] for name, x in tokens.items()}
        y, state = operation(**tokens, **rest)
        return (y[:, ::-1] if reverse else y), state

    outputs, states = [], []
    for b in range(B):
        starts = [t for t in range(1, lengths[b]) if ids[b, t] != ids[b, t - 1]]
        documents = list(zip([0, *starts], [*starts, lengths[b]], strict=True))
        row, found = [], []
        for n, (first, end) in enumerate(documents):
            own = {name: x[b : b + 1, first:end] for name, x in tokens.items()}
            others = dict(rest)
            if n == (len(documents) - 1 if reverse else 0):
                others["initial_state"] = row_of(rest["initial_state"], b)
            else:
                others["initial_state"] = jax.tree.map(np.zeros_like, row_of(rest["initial_state"], b))
            y, state = run(own, others)
            row.append(y[0])
            found.append(jax.tree.map(lambda x: np.asarray(x[0]), state))
        out = np.concatenate(row)
        outputs.append(np.pad(out, [(0, T - len(out))] + [(0, 0)] * (out.ndim - 1)))
        if wanted is None:
            states.append(found[0 if reverse else -1])
        else:
            none = jax.tree.map(np.zeros_like, found[0])
            states.append(stack([*found, *[none] * wanted][:wanted]))
    return np.stack(outputs), stack(states)


def row_of(tree, b: int):
    """Return row b of every array, as rows of one."""
    return jax.tree.map(lambda x: x[b : b + 1], tree)


def stack(trees: list):
    """Return the tree of stacked arrays."""
    return jax.tree.map(lambda *x: np.stack(x), *trees)


# By default each operation reads padded rows of documents backwards for all states, and padded rows for one.
KEPT = (True, True, True, 2), (False, True, False, None)
CASES = [
    pytest.param(*case, marks=[] if case in KEPT else pytest.mark.full)
    for case in itertools.product((True, False), (True, False), (True, False), (2, None))
]


@pytest.mark.nan
@pytest.mark.parametrize(("packed", "padded", "reverse", "states"), CASES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_documents_are_read_as_by_themselves(name, packed, padded, reverse, states):
    """Outputs, states and gradients; NaN past the rows' ends reaches none of them."""
    operation, tokens, rest = OPERATIONS[name]
    ids = IDS if packed else np.zeros_like(IDS)
    lengths = LENGTHS if padded else np.full(B, T)
    with jax.enable_x64(True):
        want, want_states = document_by_document(operation, tokens, rest, ids, lengths, reverse, states)

    past = np.arange(T) >= lengths[:, None]
    dirty = {n: np.where(past.reshape(B, T, *[1] * (x.ndim - 2)), np.nan, x) for n, x in tokens.items()}
    how = {"lengths": jnp.asarray(lengths)} if padded else {}
    how |= {"segment_ids": jnp.asarray(ids)} if packed else {}

    @jax.jit
    def run(tokens, rest):
        def f(tokens, rest):
            y, state = operation(**tokens, **rest, **how, reverse=reverse, segment_states=states)
            return jnp.sum(y**2) + sum(jnp.sum(jnp.sin(s)) for s in jax.tree.leaves(state)), (y, state)

        return jax.grad(f, (0, 1), has_aux=True)(tokens, rest)

    gradients, (y, state) = run(f32(dirty), f32(rest))
    assert_close((y, state), (want, want_states), "float32")
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(g).all(), path
    assert all(not np.asarray(g)[past].any() for g in gradients[0].values())


def test_an_empty_row_returns_its_initial_state():
    operation, tokens, rest = OPERATIONS["lstm"]
    y, state = operation(**f32(tokens | rest), lengths=jnp.array([0, 0, 0]))
    assert not np.asarray(y).any()
    np.testing.assert_array_equal(state, rest["initial_state"].astype(state.dtype))


@pytest.mark.parametrize("name", ["selective_scan", "linear_attention", "lstm"])
def test_gradients_of_the_states_are_slopes(name):
    """Gradients of the states of packed documents, by finite differences in float64."""
    operation, tokens, rest = OPERATIONS[name]
    with jax.enable_x64(True):

        def loss(given):
            how = {"segment_ids": jnp.asarray(IDS), "lengths": jnp.asarray(LENGTHS)}
            _, state = operation(**given, **how, segment_states=2)
            return jnp.sum(jnp.sin(state))

        given = {n: jnp.asarray(x) for n, x in (tokens | rest).items()}
        rng = np.random.default_rng(1)
        step = {n: jnp.asarray(rng.standard_normal(x.shape)) for n, x in given.items()}
        loss_and_gradient = jax.jit(jax.value_and_grad(loss))
        gradient = loss_and_gradient(given)[1]
        slope = float(sum(jnp.vdot(gradient[n], step[n]) for n in given))
        ahead, behind = (
            float(loss_and_gradient({n: given[n] + h * step[n] for n in given})[0]) for h in (1e-5, -1e-5)
        )
    measured = (ahead - behind) / 2e-5
    assert abs(slope - measured) < 1e-6 * abs(measured)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"lengths": jnp.array([1.0, 2.0, 3.0])}, r"lengths: got float.*\[3\]; expected integers \[3\]"),
        ({"lengths": jnp.array([1, 2])}, r"lengths: got int.*\[2\]; expected integers \[3\]"),
        (
            {"lengths": jnp.array([1, -1, 2])},
            r"lengths: got \[1, -1, 2\]; expected 0 to \d+, the row's length",
        ),
        ({"segment_states": 0}, "segment_states: got 0; expected None or a number of documents >= 1"),
    ],
)
@pytest.mark.parametrize("name", ["ssd", "lstm", "causal_conv1d"])
def test_bad_input(unchecked_types, name, how, message):
    operation, tokens, rest = OPERATIONS[name]
    with pytest.raises(ValueError, match=message):
        operation(**f32(tokens | rest), **how)
