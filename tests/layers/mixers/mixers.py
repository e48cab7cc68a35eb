"""Every sequence mixer in the sizes that its tests use, and what they compile once for all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax

WIDTH, TIME = 8, 7  # of the calls that are compiled

MIXERS = {
    "LinearAttention-elu+1": ("LinearAttention", {"heads": 2, "key_size": 5}),
    "LinearAttention-taylor": ("LinearAttention", {"heads": 2, "feature_map": "taylor", "key_size": 3}),
    "LinearAttention-learned": ("LinearAttention", {"heads": 2, "feature_map": "learned"}),
    "LinearAttention-sum": ("LinearAttention", {"heads": 2, "normalize": False}),
    "LightningAttention": ("LightningAttention", {"heads": 2}),
    "LightningAttention-lrpe": ("LightningAttention", {"heads": 2, "lrpe": True}),
    "Retention": ("Retention", {"heads": 2}),
    "GatedLinearAttention": ("GatedLinearAttention", {"heads": 2, "gate_rank": 3}),
    "GatedLinearAttention-conv": ("GatedLinearAttention", {"heads": 2, "gate_rank": 3, "conv_width": 4}),
    "HGRN2": ("HGRN2", {"heads": 2}),
    "RWKV6": ("RWKV6", {"heads": 2, "mix_rank": 3, "decay_rank": 5}),
    "MLGRU": ("MLGRU", {}),
    "FlashRNN-lstm": ("FlashRNN", {"heads": 2}),
    "FlashRNN-gru": ("FlashRNN", {"heads": 2, "cell": "gru"}),
    "FlashRNN-elman": ("FlashRNN", {"heads": 1, "cell": "elman", "normalize": False}),
    "FlashRNN-slstm": ("FlashRNN", {"heads": 2, "cell": "slstm"}),
    "LMU": ("LMU", {"order": 5, "theta": 6.0, "signals": 2}),
    "Mamba": ("Mamba", {"state_size": 3, "dt_rank": 2}),
    "Mamba-norms": ("Mamba", {"state_size": 3, "expand": 1.5, "inner_norm": 1e-6}),
    "Mamba-constant": ("Mamba", {"state_size": 3, "selective": False}),
    "Mamba2": ("Mamba2", {"heads": 4, "groups": 2, "state_size": 3}),
    "SlidingWindowAttention": ("SlidingWindowAttention", {"heads": 2, "window": 4}),
    "SlidingWindowAttention-long": ("SlidingWindowAttention", {"heads": 2, "window": 20}),
    "GatedConvolution": ("GatedConvolution", {"width": 3}),
    "Based": ("Based", {"heads": 2, "key_size": 3, "window": 4}),
}

# Parameters that another entry of their class stands for in packing and precision, but in the full tier.
VARIANTS = {
    "LinearAttention-taylor",
    "LinearAttention-learned",
    "LinearAttention-sum",
    "FlashRNN-gru",
    "FlashRNN-elman",
    "Mamba-norms",
    "Mamba-constant",
    "SlidingWindowAttention-long",
}


def together(*, full=()):
    """Parametrize a test by mixer; one worker runs a mixer's tests, and compiles its calls once for them."""

    def marks(name):
        return [pytest.mark.xdist_group(f"mixer {name}"), *([pytest.mark.full] if name in full else [])]

    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in MIXERS])


def make(name, *, batch=2, time=TIME, dtype=jnp.float64, **more):
    """(module, variables, x), with parameters far from zeros and ones, so that each of them matters."""
    class_name, arguments = MIXERS[name]
    module = getattr(frugax.layers, class_name)(**arguments, param_dtype=dtype, **more)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, time, WIDTH)), dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return module, jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), shapes), x


def floats(tree):
    """The floating leaves of a state, which have gradients."""
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]


def with_floats(tree, new):
    """The state `tree` with other floating leaves."""
    leaves, structure = jax.tree.flatten(tree)
    new = iter(new)
    chosen = [next(new) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in leaves]
    return jax.tree.unflatten(structure, chosen)


class Calls:
    """A mixer's calls in float64, each compiled once: token by token, which defines the rest, and in one.

    Attributes:
      module, variables: the mixer, with parameters away from what they start as.
      x: 3 tokens before the call, then those of the call [2, 3 + TIME, WIDTH].
      ids: the documents of the call's tokens; the first of each row goes on with that of the 3 before it.
      by_layer: the arguments of the call that differ by layer.
    """

    def __init__(self, name, **by_layer):
        self.module, self.variables, self.x = make(name, time=3 + TIME)
        self.ids = jnp.array([[7, 7, 2, 7, 7, 7, 7], [0, 0, 0, 0, 0, 1, 1]])
        call = functools.partial(self.module.apply, **by_layer)
        shape = jax.eval_shape(call, self.variables, self.x[:, :1])[1]
        self.nothing_read = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)

        def step(variables, x_BD, state, starts_B):
            state = jax.tree.map(lambda a: jnp.where(starts_B.reshape(-1, *[1] * (a.ndim - 1)), 0, a), state)
            y, state = call(variables, x_BD[:, None], state=state)
            return y[:, 0], state

        self._step, self._step_back = jax.jit(step), jax.jit(_with_gradients(step))
        self._whole = jax.jit(_with_gradients(lambda v, x, _, __: call(v, x)))
        self._packed = jax.jit(
            _with_gradients(lambda v, x, state, ids: call(v, x, state=state, segment_ids=ids))
        )

    def token_by_token(self, x, state, starts, cotangents=None):
        """(y, state) of x from `state` on, which is zeros where a document starts; and their gradients."""
        before, outputs = [state], []
        for t in range(x.shape[1]):
            y, state = self._step(self.variables, x[:, t], state, starts[:, t])
            before.append(state)
            outputs.append(y)
        out = jnp.stack(outputs, axis=1), state
        if cotangents is None:
            return out
        of_y, of_state = cotangents
        of_variables, of_x = None, []
        for t in reversed(range(x.shape[1])):
            arguments = (self.variables, x[:, t], before[t], starts[:, t], (of_y[:, t], of_state))
            _, (more, of_x_t, of_state) = self._step_back(*arguments)
            of_variables = more if of_variables is None else jax.tree.map(jnp.add, of_variables, more)
            of_x.append(of_x_t)
        return out, (of_variables, jnp.stack(of_x[::-1], axis=1), of_state)

    def whole(self, x, cotangents=None):
        """(y, state) and the gradients in one call without a state or ids."""
        return self._call(self._whole, x, self.nothing_read, self.ids, cotangents)

    def packed(self, x, state, ids, cotangents=None):
        """(y, state) and the gradients in one call with a state and ids."""
        return self._call(self._packed, x, state, ids, cotangents)

    def _call(self, compiled, x, state, ids, cotangents):
        return compiled(self.variables, x, state, ids, cotangents or self.cotangents())

    def cotangents(self):
        """What multiplies y and the state's floats in the loss of which gradients are taken."""
        rng = np.random.default_rng(2)
        of_state = [jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in floats(self.nothing_read)]
        return jnp.asarray(rng.standard_normal((2, TIME, WIDTH))), of_state


def _with_gradients(call):
    """((y, state), gradients in variables, x and the state's floats) of call(variables, x, state, rest)."""

    def run(variables, x, state, rest, cotangents):
        def of_floats(variables, x, these):
            y, after = call(variables, x, with_floats(state, these), rest)
            return (y, floats(after)), after

        (y, _), pull, after = jax.vjp(of_floats, variables, x, floats(state), has_aux=True)
        return (y, after), pull(cotangents)

    return run


@functools.cache
def calls(name):
    """The compiled calls of a mixer, for all tests of the process. Used under jax.enable_x64(True)."""
    return Calls(name)


@functools.cache
def whole(name):
    """(the parameters, x, y, the state) of a call without a state in float64, as numpy arrays."""
    with jax.enable_x64(True):
        mine = calls(name)
        x = mine.x[:, 3:]
        (y, state), _ = mine.whole(x)
        return jax.tree.map(np.asarray, (mine.variables["params"], x, y, state))
