"""Rows sent to other devices and back, as many to each as it asks for, in places whose number is static."""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..kernels.common.sharding import vary_like

AxisNames = str | tuple[str, ...]
Transport = Literal["padded", "ragged"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exchange:
    """The numbers of rows and their ways: each device sends `counts[d]` neighbouring rows to device d.

    `send` and `bring_back` are linear and each other's transposes, which is how gradients travel.

    Attributes:
      counts: rows for each device, int32 [P].
      starts: the first of them, int32 [P].
      received: rows from each device, int32 [P].
      rows: how many there are in all, sent or not.
      places: rows that a device can get from another.
      axis_name: mesh axis or axes of the P devices.
      transport: "padded" moves all P * places rows by `jax.lax.all_to_all`; "ragged" only those that there
        are, by `jax.lax.ragged_all_to_all`, which TPU and GPU have.
    """

    counts: Any
    starts: Any
    received: Any
    rows: int = dataclasses.field(metadata=dict(static=True))
    places: int = dataclasses.field(metadata=dict(static=True))
    axis_name: AxisNames = dataclasses.field(metadata=dict(static=True))
    transport: Transport | None = dataclasses.field(metadata=dict(static=True))

    def send(self, x: Float[Array, "n ..."]) -> Float[Array, "m ..."]:
        """Give each device its rows: [P * places, ...], by sender; places that are free hold zeros."""
        return _send(vary_like(x, self.counts), self)

    def bring_back(self, y: Float[Array, "m ..."]) -> Float[Array, "n ..."]:
        """Return rows to where `send` took them from: [rows, ...]; rows that were not sent are zero."""
        return _bring_back(vary_like(y, self.counts), self)


def exchange(
    counts: Int[Array, "p"],
    rows: int,
    places: int,
    axis_name: AxisNames,
    transport: Transport | None = None,
) -> Exchange:
    """Plan to send the first `counts[0]` rows to the first device, the next to the second, and so on.

    Args:
      counts: rows for each device. Of those over `places`, the last stay at home.
      rows: how many there are to send from.
      places: rows that a device can get from another, at least 1.
      axis_name: mesh axis or axes, manual in the `shard_map` around the call.
      transport: as in `Exchange`; None: "ragged" where programs are lowered for TPU or GPU.

    Raises:
      ValueError: there is no such transport.
    """
    if transport not in (None, *get_args(Transport)):
        raise ValueError(f"transport: got {transport!r}; expected None or one of {get_args(Transport)}")
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    counts = jnp.minimum(counts, places)
    received = jax.lax.all_to_all(counts, axis_name, 0, 0, tiled=True)
    return Exchange(counts, starts, received, rows, places, axis_name, transport)


def moved(x: Float[Array, "n ..."], to: Int[Array, "m"], back: Int[Array, "n"]) -> Float[Array, "m ..."]:
    """Take rows x[to], zero where `to` is out of bounds; `back` is the inverse, by which gradients go."""
    return _moved(vary_like(x, to), to, back)


@jax.custom_vjp
def _moved(x, to, back):
    return x.at[to].get(mode="fill", fill_value=0)


_moved.defvjp(
    lambda x, to, back: (_moved(x, to, back), (to, back)),
    lambda kept, dy: (_moved(dy, kept[1], kept[0]), None, None),
)


@jax.custom_vjp
def _send(x: Array, plan: Exchange) -> Array:
    return _by_platform(plan.transport, _send_padded, _send_ragged)(x, plan)


def _send_padded(x: Array, plan: Exchange) -> Array:
    place = jnp.arange(plan.places, dtype=jnp.int32)[None]
    row = jnp.where(place < plan.counts[:, None], plan.starts[:, None] + place, len(x))
    return jax.lax.all_to_all(
        x.at[row.reshape(-1)].get(mode="fill", fill_value=0), plan.axis_name, 0, 0, tiled=True
    )


def _send_ragged(x: Array, plan: Exchange) -> Array:
    devices = len(plan.counts)
    mine = jnp.full(devices, jax.lax.axis_index(plan.axis_name) * plan.places, jnp.int32)
    out = vary_like(jnp.zeros((devices * plan.places, *x.shape[1:]), x.dtype), x)
    sizes = plan.counts, mine, plan.received
    return jax.lax.ragged_all_to_all(x, out, plan.starts, *sizes, axis_name=plan.axis_name)


@jax.custom_vjp
def _bring_back(y: Array, plan: Exchange) -> Array:
    return _by_platform(plan.transport, _bring_back_padded, _bring_back_ragged)(y, plan)


def _bring_back_padded(y: Array, plan: Exchange) -> Array:
    y = jax.lax.all_to_all(y, plan.axis_name, 0, 0, tiled=True)
    row = jnp.arange(plan.rows, dtype=jnp.int32)
    # The last device that starts at or before a row: devices without rows start where the next one does.
    device = jnp.searchsorted(plan.starts, row, side="right").astype(jnp.int32) - 1
    place = row - plan.starts[device]
    at = jnp.where(place < plan.counts[device], device * plan.places + place, len(y))
    return y.at[at].get(mode="fill", fill_value=0)


def _bring_back_ragged(y: Array, plan: Exchange) -> Array:
    theirs = jnp.arange(len(plan.counts), dtype=jnp.int32) * plan.places
    starts = jax.lax.all_to_all(plan.starts, plan.axis_name, 0, 0, tiled=True)
    out = vary_like(jnp.zeros((plan.rows, *y.shape[1:]), y.dtype), y)
    sizes = plan.received, starts, plan.counts
    return jax.lax.ragged_all_to_all(y, out, theirs, *sizes, axis_name=plan.axis_name)


def _by_platform(transport: Transport | None, padded: Any, ragged: Any) -> Any:
    if transport is not None:
        return padded if transport == "padded" else ragged
    return functools.partial(jax.lax.platform_dependent, default=padded, tpu=ragged, cuda=ragged)


_send.defvjp(lambda x, plan: (_send(x, plan), plan), lambda plan, dy: (_bring_back(dy, plan), None))
_bring_back.defvjp(lambda y, plan: (_bring_back(y, plan), plan), lambda plan, dx: (_send(dx, plan), None))
