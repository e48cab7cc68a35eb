"""A stateful module's calls, each compiled once: token by token, which defines the rest, and in one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def floats(tree):
    """The floating leaves of a tree, which have gradients."""
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]


def with_floats(tree, new):
    """The tree with other floating leaves."""
    leaves, structure = jax.tree.flatten(tree)
    new = iter(new)
    chosen = [next(new) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in leaves]
    return jax.tree.unflatten(structure, chosen)


def zero_rows(tree, rows, axis=0):
    """The tree with zeros in the rows of the batch, which is its leaves' `axis`."""

    def zero(leaf):
        shape = [1] * leaf.ndim
        shape[axis] = -1
        return jnp.where(rows.reshape(shape), 0, leaf)

    return jax.tree.map(zero, tree)


class Calls:
    """A call, call(variables, x, state=..., segment_ids=...) -> (y, state), in its forms and with gradients.

    Attributes:
      variables: of the module.
      x: some tokens before a call, then those of the call [B, ..., D], or [B, ...] of ids.
      ids: the documents of the call's tokens [B, T]; the first of each row goes on with that before the call.
      nothing_read: the state of zeros.

    Without `gradients` their place is None, and none are compiled.
    """

    def __init__(self, call, variables, x, ids, reset=zero_rows, gradients=True):
        self.variables, self.x, self.ids = variables, x, ids
        self.y, shape = jax.eval_shape(call, variables, x[:, -ids.shape[1] :])
        self.nothing_read = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)

        def step(variables, x_BD, state, starts_B):
            y, state = call(variables, x_BD[:, None], state=reset(state, starts_B))
            return y[:, 0], state

        def with_gradients(call):
            return jax.jit(functools.partial(_with_gradients if gradients else _without_gradients, call))

        self._step = with_gradients(step)
        self._whole = with_gradients(lambda v, x, _, __: call(v, x))
        self._packed = with_gradients(lambda v, x, state, ids: call(v, x, state=state, segment_ids=ids))

    @property
    def now(self):
        """The tokens of the call."""
        return self.x[:, -self.ids.shape[1] :]

    def before(self):
        """The state that the tokens before the call leave."""
        x = self.x[:, : -self.ids.shape[1]]
        return self.token_by_token(x, self.nothing_read, np.zeros(x.shape[:2], bool))[1]

    def starts(self):
        """True where a document starts [B, T], but at the first token."""
        ids = np.asarray(self.ids)
        return np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))

    def step(self, x, state, starts):
        """(y, state) of a row's next token: the program with gradients, for cotangents of zero."""
        of_y, of_state = jax.tree.map(np.zeros_like, self.cotangents())
        return self._step(self.variables, x, state, starts, (of_y[:, 0], of_state))[0]

    def token_by_token(self, x, state, starts, cotangents=None):
        """(y, state) of x from `state` on, which is zeros where a document starts; and the gradients."""
        x, starts = jax.tree.map(np.asarray, (x, starts))
        before, outputs = [state], []
        for t in range(x.shape[1]):
            y, state = self.step(x[:, t], state, starts[:, t])
            before.append(state)
            outputs.append(y)
        out = np.stack(outputs, axis=1), state
        if cotangents is None:
            return out
        of_y, of_state = jax.tree.map(np.asarray, cotangents)
        of_variables, of_x = None, []
        for t in reversed(range(x.shape[1])):
            arguments = (self.variables, x[:, t], before[t], starts[:, t], (of_y[:, t], of_state))
            _, (more, of_token, of_state) = self._step(*arguments)
            of_variables = more if of_variables is None else jax.tree.map(np.add, of_variables, more)
            of_x.append(of_token)
        of_x = jax.tree.map(lambda *tokens: np.stack(tokens[::-1], axis=1), *of_x)
        return out, (of_variables, of_x, of_state)

    def whole(self, x, cotangents=None):
        """(y, state) and the gradients of one call without a state or ids."""
        return self._whole(self.variables, x, self.nothing_read, self.ids, cotangents or self.cotangents())

    def packed(self, x, state, cotangents=None):
        """(y, state) and the gradients of one call with a state and ids."""
        return self._packed(self.variables, x, state, self.ids, cotangents or self.cotangents())

    def cotangents(self):
        """The factors of y and of the state's floats in the loss that gradients are of."""
        rng = np.random.default_rng(2)
        shapes = (self.y, floats(self.nothing_read))
        return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype), shapes)


def _without_gradients(call, variables, x, state, rest, _):
    """(y, state) of call(variables, x, state, rest), and None."""
    return call(variables, x, state, rest), None


def _with_gradients(call, variables, x, state, rest, cotangents):
    """(y, state) of call(variables, x, state, rest); gradients in variables, x and the state's floats."""

    def of_floats(variables, x_floats, state_floats):
        y, after = call(variables, with_floats(x, x_floats), with_floats(state, state_floats), rest)
        return (y, floats(after)), after

    (y, _), pull, after = jax.vjp(of_floats, variables, floats(x), floats(state), has_aux=True)
    return (y, after), pull(cotangents)
