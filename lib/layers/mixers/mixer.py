"""The base class of sequence mixers: dtypes, backend, and how they make their projections."""

import inspect
import types
from collections.abc import Sequence
from typing import Any, ClassVar, Union, get_args, get_origin

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ...kernels.common.arguments import reject
from ...kernels.common.operation import Backend
from ...kernels.common.rows import RowArguments, rows
from ..modules.dense import projection, projections
from ..modules.inputs import check_input


def summable(*operands: Array) -> tuple[Array, ...]:
    """The operands of sums over time: float16 as float32, whose range the sums before a norm can't leave."""
    return tuple(x.astype(jnp.float32) if x.dtype == jnp.float16 else x for x in operands)


class Mixer(nn.Module):
    """A sequence mixer: `mixer(x, *, state=None, segment_ids=None) -> (y, state)` over x [B, T, D].

    Training passes no state; chunked prefill passes the one it got; decoding is the same call with T == 1.
    A state is a pytree of arrays with the batch in front, and zeros mean "nothing read yet". It belongs to
    the document of the call's first token; documents after that one start afresh inside the call.

    Args of the call:
      x: [B, T, D], floating.
      state: what the last call returned; None starts afresh.
      segment_ids: the document of each token [B, T]; nothing passes from one to the next.
      lengths: how many tokens of each row are real [B]; None means all. Those after them are not read, and
        their outputs are zeros; the state returned is that of each row's last real token.
      segment_states: return the states after each of a row's first N documents, with N behind every leaf's
        batch, instead of its last; zeros for documents that a row does not have.
      reverse: read each row from its last real token to its first. Not together with `segment_states`.

    Raises:
      ValueError: naming the argument that can't be right.

    A subclass writes `mix(x, state, rows)`: x is in the order read and the compute dtype, and `rows` are
    the arguments of operations: `linear_attention(..., **rows)`.

    Attributes:
      dtype: what the mixer computes and returns in; None means the input's.
      param_dtype: what its parameters are kept in.
      backend: handed to `frugax.kernels`; None picks by platform, "xla" has `jax.jvp` too.
      out_scale: multiplies the initial output projection; a decoder of depth L passes 1 / sqrt(2 L).
      ternary: make every projection a `BitLinear`.

    Example:
        >>> import frugax, jax
        >>> class Mean(frugax.layers.Mixer):  # of the tokens so far: a mixer in five lines
        ...     def mix(self, x, state, rows):
        ...         total, state = frugax.kernels.linear_recurrence(0 * x + 1, x, initial_state=state, **rows)
        ...         return total / (1 + jax.numpy.arange(x.shape[1]))[:, None], state
        >>> y, state = Mean().apply({}, jax.numpy.ones((1, 3, 2)))
        >>> float(y[0, 2, 0]), float(state[0, 0])
        (1.0, 3.0)
    """

    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    backend: Backend | None = None
    out_scale: float = 1.0
    ternary: bool = False

    # A module (depth, width) -> {keyword: [depth, ...]}: what calls of this mixer take that differs by layer.
    over_depth: ClassVar[type[nn.Module] | None] = None

    def __call__(
        self,
        x: Array,
        *,
        state: Any = None,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        segment_states: int | None = None,
        reverse: bool = False,
        **of_layer: Any,
    ) -> tuple[Array, Any]:
        x = self.prepare(x, segment_ids)
        read = rows(x.shape[:2], segment_ids, lengths, segment_states, reverse)
        if reverse and segment_states is not None:
            raise ValueError(f"segment_states: got {segment_states} with reverse=True; expected None")
        if read is not None:
            x, segment_ids = read.read(x), read.ids
        for leaf in jax.tree.leaves(state):
            if jnp.ndim(leaf) == 0 or leaf.shape[0] != x.shape[0]:
                reject("state", leaf, f"every leaf [{x.shape[0]}, ...], the batch of x")
        self._check_kind(state)
        how = RowArguments(segment_ids=segment_ids, lengths=lengths, segment_states=segment_states)
        y, state = self.mix(x, state, how, **of_layer)
        return (y if read is None else read.write(y)), state

    def mix(self, *args: Any, **of_layer: Any) -> tuple[Array, Any]:
        """(x [B, T, D], state, rows) -> (y [B, T, D], state), and what differs by layer by keyword."""
        raise NotImplementedError(f"{type(self).__name__}.mix: expected a method of this mixer")

    def _check_kind(self, state: Any) -> None:
        """Refuse a state of another class than those that `mix` names: `state: MambaState | None`.

        A `mix` of the user's may say anything else, or nothing: its state is then not checked.
        """
        parameter = inspect.signature(type(self).mix).parameters.get("state")
        annotation = None if parameter is None else parameter.annotation
        kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
        named = tuple(kind for kind in kinds if kind is not type(None))
        if state is None or not all(isinstance(kind, type) and hasattr(kind, "_fields") for kind in named):
            return
        if named and not isinstance(state, named):
            expected = " or ".join(kind.__name__ for kind in named)
            raise ValueError(
                f"state: got {type(state).__name__}; expected {expected}, as {type(self).__name__} returns it"
            )

    def prepare(self, x: Array, segment_ids: Array | None) -> Array:
        """The input in the compute dtype; ValueError where it can't be right."""
        check_input(x, segment_ids)
        return x if self.dtype is None else x.astype(self.dtype)

    def dense(self, x: Array, features: int, name: str, **attributes: Any) -> Array:
        """x [..., D] -> [..., features] by a matrix, in x's dtype; attributes as `projection` takes them."""
        dtypes = {"dtype": x.dtype, "param_dtype": self.param_dtype}
        how = {"ternary": self.ternary, "backend": self.backend} | dtypes | attributes
        return projection(features, name=name, **how)(x)

    def dense_parts(self, x: Array, sizes: Sequence[int], name: str, **attributes: Any) -> list[Array]:
        """x [..., D] by several matrices that lie side by side in one, each of as many columns."""
        dtypes = {"dtype": x.dtype, "param_dtype": self.param_dtype}
        how = {"ternary": self.ternary, "backend": self.backend} | dtypes | attributes
        return projections(sizes, name=name, **how)(x)

    def output(self, x: Array, features: int) -> Array:
        """The projection back to the residual stream, scaled for the depth at its birth."""
        return self.dense(x, features, "out", scale=self.out_scale)
