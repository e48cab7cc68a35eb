"""LMUFormer: its memory reads the past, convolution and stream agree, and its parts are their equations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close

from ..layers.mixers.mixers import make


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
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0.3, 0.6, p.shape), p.dtype), shapes)


def test_the_mixer_is_its_equation():
    from frugax.kernels.lmu import _system

    with jax.enable_x64(True):
        module, variables, x = make("LMU")
        y, state = jax.jit(module.apply)(variables, x)
        p, x = jax.tree.map(np.asarray, variables["params"]), np.asarray(x)
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
            x = jnp.asarray(signal)[None, :, None]
            variables = mixer.init(jax.random.key(0), x)
            variables["params"]["signal"]["kernel"] = jnp.ones((1, 1))
            _, state = mixer.apply(variables, x)
        oldest = np.asarray(state.memory)[0, 0].sum()  # P_n(1) = 1
        errors.append(abs(oldest - signal[T - 1 - int(theta)]))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.02


def one_array(tree):
    """A whole tree: of neurons that all fired, or none did, some part is 0."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("spiking", [False, True])
def test_convolution_chunks_and_stream_agree(spiking):
    """40 tokens go through the FFT, chunks of 19 too, with a state; single ones go through the loop."""
    with jax.enable_x64(True):
        model = small(spiking)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40, 3)))
        variables = filled(model, x)
        whole, last = jax.jit(model.apply)(variables, x)
        assert whole.shape == (2, 40, 4)

        def chunks(variables, x):
            first, state = model.apply(variables, x[:, :19])
            second, state = model.apply(variables, x[:, 19:38], state=state)
            third, state = model.apply(variables, x[:, 38:], state=state)
            return jnp.concatenate([first, second, third], axis=1), state

        def stream(variables, x):
            first, state = model.apply(variables, x[:, :1])

            def step(state, token):
                y, state = model.apply(variables, token[:, None], state=state)
                return state, y[:, 0]

            state, rest = jax.lax.scan(step, state, jnp.moveaxis(x[:, 1:], 1, 0))
            return jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1), state

        want = (whole, one_array(last))
        for name, run in (("chunks", chunks), ("stream", stream)):
            y, state = jax.jit(run)(variables, x)
            assert_close((y, one_array(state)), want, "float64", name=name)


@pytest.mark.parametrize(("spiking", "ends"), [(False, (0, 4, 5, 13)), (True, (0, 4, 9))])
def test_packed_is_separate(spiking, ends):
    with jax.enable_x64(True):
        model = small(spiking)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, ends[-1], 3)))
        variables = filled(model, x)
        ids = jnp.asarray(np.repeat([7, 2, 7][: len(ends) - 1], np.diff(ends))[None])

        def packed(variables, x):
            return model.apply(variables, x, segment_ids=ids)[0]

        def separate(variables, x):
            parts = [model.apply(variables, x[:, a:b])[0] for a, b in itertools.pairwise(ends)]
            return jnp.concatenate(parts, axis=1)

        def with_gradient(run):
            def loss(variables, x):
                y = run(variables, x)
                return jnp.sum(jnp.sin(y)), y

            grads, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables, x)
            return one_array(grads), y

        assert_close(with_gradient(packed), with_gradient(separate), "float64")


def test_the_embedding_is_a_stack_of_causal_convolutions():
    with jax.enable_x64(True):
        embed = frugax.layers.ConvEmbedding(4, param_dtype=jnp.float64)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 3)))
        variables = filled(embed, x)
        y, _ = embed.apply(variables, x)
        p = jax.tree.map(np.asarray, variables["params"])
        h, outputs = np.asarray(x), []
        for i in range(5):
            if i:
                h = h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + 1e-6) * p[f"norm_{i}"]["weight"]
                h = np.maximum(h, 0)
            padded = np.pad(h, ((0, 0), (2, 0), (0, 0)))
            h = sum(padded[:, j : j + 9] @ p[f"conv_{i}"]["kernel"][j] for j in range(3))
            outputs.append(h)
        assert_close(y, outputs[3] + outputs[4], "float64")


def test_a_spiking_model_sends_spikes_and_learns_through_all_of_it():
    """As it starts: every parameter has a gradient, so its neurons neither all rest nor all fire."""
    model = frugax.layers.LMUFormer(
        classes=3, width=16, depth=2, mixer_args={"order": 8, "theta": 20.0, "spiking": True}, spiking=True
    )
    x = jax.random.normal(jax.random.key(1), (4, 30, 5))
    variables = model.init(jax.random.key(0), x)

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
        model.init(jax.random.key(0), jnp.ones((1, 5, 3)))
