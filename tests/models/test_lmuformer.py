"""LMUFormer: its memory reads the past, convolution and stream agree, and its parts are their equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close

from ..layers.calls import Calls, zero_rows
from ..layers.mixers.mixers import whole


def small(spiking, **more):
    args = {"order": 5, "theta": 7.0, "signals": 2, "spiking": spiking}
    return frugax.layers.LMUFormer(
        classes=4,
        width=6,
        depth=2,
        mixer_args=args,
        spiking=spiking,
        expand=2,
        param_dtype=jnp.float64,
        **more,
    )


def filled(model, x):
    """Random parameters: far from what they start as, and neurons of a spiking model fire."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)

    def draw(path, p):  # norms of 2 bring neurons to their threshold
        mean, spread = (2.0, 0.3) if path[-1].key == "weight" else (0.3, 0.6)
        return jnp.asarray(rng.normal(mean, spread, p.shape), p.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def test_the_mixer_is_its_equation():
    from frugax.kernels.lmu import _system

    with jax.enable_x64(True):
        p, x, y, state = whole("LMU")
        u = np.maximum(x @ p["signal"]["kernel"] + p["signal"]["bias"], 0)
        A, B = _system(5, 6.0)
        m, memory = [], np.zeros((2, 2, 5))
        for t in range(x.shape[1]):
            memory = memory @ A.T + u[:, t, :, None] * B
            m.append(memory.reshape(2, -1))
        mx = np.concatenate([np.stack(m, axis=1), x], axis=-1)
        h = np.maximum(mx @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
        assert_close(y, h @ p["out"]["kernel"], "float64")
        assert_close(state.memory, memory, "float64")


def test_the_memory_reads_the_window_and_better_so_with_order():
    """A band-limited signal through the mixer's own projection: Legendre polynomials give u(t - theta)."""
    T, theta = 400, 60.0
    t = np.arange(T)
    signal = 2 + np.sin(2 * np.pi * t / 90) + 0.5 * np.cos(2 * np.pi * t / 45)  # positive: relu lets it by
    errors = []
    for order in (3, 6, 9):
        with jax.enable_x64(True):
            mixer = frugax.layers.LMU(order=order, theta=theta, param_dtype=jnp.float64)
            x = signal[None, :, None]
            variables = jax.tree.map(
                lambda p: np.ones(p.shape) if p.ndim == 2 else np.zeros(p.shape),
                jax.eval_shape(mixer.init, jax.random.key(0), x),
            )
            _, state = jax.jit(mixer.apply)(variables, x)
        oldest = np.asarray(state.memory)[0, 0].sum()  # P_n(1) = 1
        errors.append(abs(oldest - signal[T - 1 - int(theta)]))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.02


def one_array(tree):
    """A whole tree: of neurons that all fired, or none did, some part is 0."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def new_rows(state, rows):
    """The state with zeros in rows of the batch, which stands behind the depth in those of the blocks."""
    return zero_rows(state, rows)._replace(blocks=zero_rows(state.blocks, rows, axis=1))


@functools.cache
def calls(spiking, gradients=False):
    model = small(spiking)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3 + 7, 3)))
    ids = jnp.array([[7, 7, 2, 7, 7, 7, 7], [0, 0, 0, 0, 0, 1, 1]])
    return Calls(model.apply, filled(model, x), x, ids, new_rows, gradients)


def test_a_spiking_stream_goes_on_in_packed_rows():
    """The values alone; gradients, and the model without spikes, are the next test's."""
    with jax.enable_x64(True):
        mine = calls(True)
        state = mine.before()
        want = mine.token_by_token(mine.now, state, mine.starts())
        (y, after), _ = mine.packed(mine.now, state)
        assert_close((y, one_array(after)), (want[0], one_array(want[1])), "float64")


@pytest.mark.full
@pytest.mark.parametrize("spiking", [False, True])
def test_packed_rows_that_go_on_are_token_by_token(spiking):
    with jax.enable_x64(True):
        mine = calls(spiking, gradients=True)
        state = mine.before()
        want = mine.token_by_token(mine.now, state, mine.starts(), mine.cotangents())
        got = mine.packed(mine.now, state)
        assert_close(list(map(one_array, got)), list(map(one_array, want)), "float64")


@pytest.mark.full
@pytest.mark.parametrize("spiking", [False, True])
def test_convolution_chunks_and_stream_agree(spiking):
    """40 tokens go through the FFT, chunks of 20 too, with a state; single ones go through the loop."""
    with jax.enable_x64(True):
        model = small(spiking)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40, 3)))
        mine = calls(spiking)
        want, last = mine.token_by_token(x, mine.nothing_read, jnp.zeros((2, 40), bool))
        apply = jax.jit(model.apply)
        whole = apply(mine.variables, x)
        assert whole[0].shape == (2, 40, 4)
        first, state = apply(mine.variables, x[:, :20])
        second, state = apply(mine.variables, x[:, 20:], state=state)
        for y, after in (whole, (jnp.concatenate([first, second], axis=1), state)):
            assert_close((y, one_array(after)), (want, one_array(last)), "float64")


def rms_norm(x, p):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p["weight"]


def neurons(x, threshold=1.0):
    """Spikes of leaky membranes [B, T, n], token by token."""
    v, spikes = np.zeros(x[:, 0].shape), []
    for t in range(x.shape[1]):
        v = v + (x[:, t] - v) / 2
        spikes.append(v >= threshold)
        v = np.where(spikes[-1], 0, v)
    return np.stack(spikes, axis=1).astype(float)


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def embedding(p, x, spiking):
    def conv(i, x):
        padded = np.pad(x, ((0, 0), (2, 0), (0, 0)))
        return sum(padded[:, j : j + x.shape[1]] @ p[f"conv_{i}"]["kernel"][j] for j in range(3))

    for i in range(4):
        x = conv(i, x)
        if not spiking:
            x = rms_norm(relu(x), p[f"norm_{i + 1}"])
        elif i < 3:
            x = neurons(rms_norm(x, p[f"norm_{i + 1}"]))
    return x + conv(4, neurons(rms_norm(x, p["norm_4"])) if spiking else x)


def legendre(p, x, spiking):
    """The mixer: its memory holds the window as coefficients, one more token at a time."""
    from frugax.kernels.lmu import _system

    A, B = _system(5, 7.0)
    x = neurons(x, 0.5) if spiking else x
    act = neurons if spiking else relu
    u = act(x @ p["signal"]["kernel"] + p["signal"]["bias"])
    m, memory = [], np.zeros((x.shape[0], 2, 5))
    for t in range(x.shape[1]):
        memory = memory @ A.T + u[:, t, :, None] * B
        m.append(memory.reshape(-1, 10))
    m = np.stack(m, axis=1)
    if spiking:
        m = neurons(rms_norm(m, p["memory_norm"]))
    h = np.concatenate([m, x], axis=-1) @ p["hidden"]["kernel"] + p["hidden"]["bias"]
    return act(rms_norm(h, p["hidden_norm"]) if spiking else h) @ p["out"]["kernel"]


@pytest.mark.parametrize("spiking", [False, True])
def test_the_model_is_its_formula(spiking):
    with jax.enable_x64(True):
        mine = calls(spiking)
        (logits, _), _ = mine.whole(mine.now)
        p, x = jax.tree.map(np.asarray, (mine.variables["params"], mine.now))
    x = embedding(p["embedding"], x, spiking)
    for i in range(2):
        b = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        y = legendre(b["mixer"], rms_norm(x, b["mixer_norm"]) if spiking else x, spiking)
        x = x + rms_norm(y, b["mixed_norm"])
        if spiking:
            y = neurons(rms_norm(x, b["channel_norm"])) @ b["channel_in"]["kernel"]
            x = x + neurons(rms_norm(y, b["hidden_norm"])) @ b["channel_out"]["kernel"]
        else:
            y = gelu(rms_norm(x @ b["channel_in"]["kernel"], b["hidden_norm"]))
            x = x + relu(rms_norm(y @ b["channel_out"]["kernel"], b["channel_norm"]))
    if spiking:
        x = neurons(rms_norm(x, p["norm"]))
        assert 0.05 < x.mean() < 0.95
    mean = np.cumsum(x, axis=1) / np.arange(1, 8)[:, None]
    assert_close(logits, mean @ p["head"]["kernel"] + p["head"]["bias"], "float64")


def test_a_spiking_model_sends_spikes_and_learns_through_all_of_it():
    """As it starts: every parameter has a gradient, so its neurons neither all rest nor all fire."""
    model = frugax.layers.LMUFormer(
        classes=3, width=16, depth=2, mixer_args={"order": 8, "theta": 20.0, "spiking": True}, spiking=True
    )
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 30, 5)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def loss(variables):
        logits, state = model.apply(variables, x)
        return jnp.sum(jnp.sin(logits)), state

    grads, state = jax.jit(jax.grad(loss, has_aux=True))(variables)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        assert np.abs(g).max() > 0, path
    memory = np.asarray(state.blocks[0].memory)
    assert memory.shape == (2, 4, 1, 8)
    assert (np.abs(memory[..., 0]) > 0.01).any()  # the signal fired, and
    assert (np.abs(memory[..., 0]) < 0.99).any()  # not at every token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, "classes: got 0"),
        ({"depth": 0}, "depth: got 0"),
        ({"taps": 0}, "taps: got 0"),
        ({"mixer": "LSTM"}, "mixer: got 'LSTM'; expected one of"),
        ({"mixer_args": {"orders": 3}}, "LMU takes no 'orders'"),
        ({"mixer_args": {"signals": 0}}, "signals: got 0"),
        ({"mixer_args": {"order": 0}}, "order: got 0"),
        ({"mixer_args": {"theta": 0.0}}, "theta: got 0.0"),
    ],
)
def test_bad_input(arguments, message):
    model = frugax.layers.LMUFormer(**({"classes": 2, "width": 4} | arguments))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 5, 3)))
