"""Rows times packed experts on Hopper, by the kernels of `quantized_matmul`: W is decoded in registers.

A tile of tokens multiplies one matrix there. So each expert's rows are copied to tiles of their own, which
is little beside the experts' codes; the last may be short of rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ...quantized_matmul import inputs as one
from ...quantized_matmul import pallas_gpu as kernels
from ...quantized_matmul.pallas_gpu.kernel import Stack, product
from ...quantized_matmul.pallas_gpu.tiling import Tiling, tiling
from ...quantized_matmul.pallas_gpu.transposed import gradient
from ..decode import stored
from ..inputs import Inputs, Spec, shape
from ..rows import Products, read


class Places(NamedTuple):
    """The tiles of tokens.

    Attributes:
      expert: of each tile, int32; -1 of those that are left over.
      row: the place of each row among the tiles' rows, int32 [M]; past the last for rows of no expert.
    """

    expert: Array
    row: Array


def places(group_sizes: Array, M: int, tokens: int) -> Places:
    """The tiles of `tokens` rows that each expert's rows fill."""
    E = group_sizes.shape[0]
    most = M // tokens + min(E, M)
    tiles = -(-group_sizes // tokens)
    end, last = (jnp.cumsum(x, dtype=jnp.int32) for x in (group_sizes, tiles))
    row, tile = (jnp.arange(n, dtype=jnp.int32) for n in (M, most))
    of_row, of_tile = (
        jnp.sum(x[:, None] >= y[None], 1, dtype=jnp.int32) for x, y in ((row, end), (tile, last))
    )
    start = (last - tiles) * tokens - (end - group_sizes)  # what is added to an expert's rows
    place = row + start.at[of_row].get(mode="fill", fill_value=0)
    return Places(jnp.where(of_tile < E, of_tile, -1), jnp.where(of_row < E, place, most * tokens))


def unsupported_reason(call: Inputs, spec: Spec) -> str | None:
    """Why these kernels can't serve the call; None if they can."""
    reason = kernels.unsupported_reason(*_one_of(call, spec))
    if reason is not None:
        return reason
    assert call.scales is not None
    for backward in (False, True):
        if call.scales.shape[1] % _sizes(call, spec, backward).groups:
            return "the GPU kernel takes packed experts by blocks that have all of their groups"
    return None


def products(call: Inputs, spec: Spec, *, interpret: bool) -> Products:
    """The products with a call's packed experts, which are constants."""
    E, M, _, _ = shape(call, spec)
    forward, backward = (_sizes(call, spec, b) for b in (False, True))

    def below(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:]) if x.ndim > 1 else x

    arrays = {name: below(x) for name, x in stored(call).items()}

    def run(x: Array, sizes: Tiling, multiply: Callable[[Array, Stack], Array]) -> Array:
        found = places(call.group_sizes, M, sizes.tokens)
        tokens = jnp.zeros((found.expert.shape[0] * sizes.tokens, x.shape[1]), x.dtype)
        y = multiply(tokens.at[found.row].set(x, mode="drop"), Stack(found.expert, E))
        return read(y, found.row)

    def times(x: Array, stack: Stack) -> Array:
        return product(*_inputs(spec, x, arrays), forward, stack, interpret=interpret)

    def times_transposed(dy: Array, stack: Stack) -> Array:
        of_one, spec_of_one = _inputs(spec, call.lhs, arrays)
        return gradient(of_one, dy, spec_of_one, backward, stack, interpret=interpret)

    def of_experts(x: Array, dy: Array) -> Array:
        raise AssertionError("packed experts are constants")

    return Products(
        lambda x: run(x, forward, times), lambda dy: run(dy, backward, times_transposed), of_experts
    )


def _inputs(spec: Spec, x: Any, arrays: dict[str, Any]) -> tuple[one.Inputs, one.Spec]:
    """A call of `quantized_matmul` with these arrays."""
    assert spec.format is not None
    given = dict.fromkeys(one.Inputs._fields) | arrays | {"x": x}
    return one.Inputs(**given), one.Spec(spec.format, spec.group_size, spec.K, None, "dot")


def _one_of(call: Inputs, spec: Spec) -> tuple[one.Inputs, one.Spec]:
    """The shapes of one expert's product with as many rows as experts have on average."""
    E, M, K, _ = shape(call, spec)
    arrays = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in stored(call).items()}
    return _inputs(spec, jax.ShapeDtypeStruct((-(-M // E), K), call.lhs.dtype), arrays)


def _sizes(call: Inputs, spec: Spec, backward: bool) -> Tiling:
    E, M, _, _ = shape(call, spec)
    found, _ = tiling(*_one_of(call, spec), backward, matrices=min(E, M))
    assert found is not None  # unsupported_reason
    return found
