"""The documents in packed rows: where they start and end, in each form that operations ask for."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from .arguments import reject


@dataclass(frozen=True)
class Documents:
    """Packed rows [B, T], of which the first token goes on with a document that began before the call."""

    starts: Array  # bool [B, T]: a document starts at the token; never at the first one

    @property
    def ends(self) -> Array:
        """bool [B, T]: a document ends at the token; never at the last one."""
        return jnp.pad(self.starts[:, 1:], ((0, 0), (0, 1)))

    @property
    def index(self) -> Array:
        """int32 [B, T]: how many documents have started since the first token."""
        return jnp.cumsum(self.starts, axis=1, dtype=jnp.int32)

    def reach(self, before: int | Array = 0) -> Array:
        """int32 [B, T]: how many tokens of its document precede a token; `before` [B] the call's first."""
        B, T = self.starts.shape
        t = jnp.arange(T, dtype=jnp.int32)[None]
        first = jnp.broadcast_to(-jnp.asarray(before, jnp.int32), (B,))[:, None]
        # The index at which each token's document starts: below 0 where that was in an earlier call.
        return t - jax.lax.cummax(jnp.where(self.starts, t, first), axis=1)


def check_segment_ids(segment_ids: Array | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `segment_ids` is None or integers of `shape`."""
    if segment_ids is None:
        return
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer) or segment_ids.shape != shape:
        reject("segment_ids", segment_ids, f"integers {list(shape)}")


def documents(segment_ids: Array | None, batch: int, time: int) -> Documents | None:
    """The documents of rows whose id changes where one ends; None where no ids are given.

    Raises:
      ValueError: `segment_ids` are not integers [batch, time].

    Example:
        >>> import jax.numpy as jnp
        >>> packed = documents(jnp.array([[3, 3, 5, 5, 5]]), 1, 5)
        >>> packed.starts.astype(int).tolist(), packed.index.tolist(), packed.reach(7).tolist()
        ([[0, 0, 1, 0, 0]], [[0, 0, 1, 1, 1]], [[7, 8, 0, 1, 2]])
    """
    check_segment_ids(segment_ids, (batch, time))
    if segment_ids is None:
        return None
    return Documents(jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0))))
