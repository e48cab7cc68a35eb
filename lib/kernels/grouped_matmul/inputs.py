"""The checked call of `grouped_matmul` and its static description: the form that every backend takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify

from ...formats import Format, QuantizedTensor, check_storage
from ..common.arguments import known, reject
from ..quantized_matmul import inputs as packed

INDEPENDENT = ("n",)
PACKED = ("codes", "scales", "zeros", "outer", "offset", "choices")  # arrays of packed experts


class Inputs(NamedTuple):
    """The arrays of a call, None where there are none. Experts are floats, or arrays as they are stored.

    Group sizes are >= 0 and sum to at most M, whatever the caller gave. There are E experts with G groups of
    rows; the arrays of packed ones are those of `quantized_matmul`, with E in front.
    """

    lhs: Array  # [M, K], or [T, K] with gather
    group_sizes: Array  # int32 [E]
    rhs: Array | None  # [E, K, N], float
    codes: Array | None  # [E, rows of packed codes, N]
    scales: Array | None  # [E, G, N]
    zeros: Array | None  # [E, G, N]
    outer: Array | None  # [E]
    offset: Array | None  # [E]
    choices: Array | None  # [E, ceil(G / 4), N]
    gather: Array | None  # int32 [M]: row i reads lhs[gather[i]]
    scatter: Array | None  # int32 [M]: row i is added to the result's row scatter[i]
    weights: Array | None  # float [M], times each row before it is added
    rows_of: Array | None  # int32 [T, c]: the rows that are token t's; M where there are fewer


class Spec(NamedTuple):
    """Everything of a call that is not an array; hashable."""

    format: Format | None  # of packed experts
    group_size: int  # rows of an expert that share a scale; K of floats
    K: int  # rows of an expert
    out_rows: int | None  # rows of the result with scatter


def check(
    lhs: Array,
    rhs: Array | QuantizedTensor,
    group_sizes: Array,
    gather: Array | None,
    scatter: Array | None,
    weights: Array | None,
    out_rows: int | None,
    rows_of: Array | None = None,
) -> tuple[Inputs, Spec]:
    """Raise ValueError naming the argument that can't be right, or return the checked call."""
    if isinstance(rhs, QuantizedTensor):
        if rhs.ndim != 3 or rhs.axis != -2:
            got = f"{rhs.format.name}{[*rhs.shape]} in groups along axis {rhs.axis}"
            raise ValueError(f"rhs: got {got}; expected [E, K, N] in groups along axis -2")
        check_storage(rhs)
    elif rhs.ndim != 3 or not jnp.issubdtype(rhs.dtype, jnp.floating):
        reject("rhs", rhs, "floats [E, K, N] or a QuantizedTensor of that shape")
    E, K, N = rhs.shape
    if lhs.ndim != 2 or lhs.shape[1] != K or not jnp.issubdtype(lhs.dtype, jnp.floating):
        reject("lhs", lhs, f"floats [rows, {K}] for rhs {[E, K, N]}")
    if any(known(size) and size == 0 for size in (*lhs.shape, E, N)):
        reject("lhs", lhs, f"every size >= 1, of rhs {[E, K, N]} too")
    if not isinstance(rhs, QuantizedTensor) and rhs.dtype != lhs.dtype:
        reject("rhs", rhs, f"lhs's dtype {lhs.dtype}")
    _check_integers("group_sizes", group_sizes, E)
    M = lhs.shape[0]
    if gather is not None:
        M = gather.shape[0] if gather.ndim == 1 else M
        _check_integers("gather", gather, M)
    _check_scatter(M, scatter, weights, out_rows)
    group_sizes = _within(group_sizes, M)
    gather = _indices("gather", gather, lhs.shape[0])
    scatter = _indices("scatter", scatter, out_rows)
    arrays: dict[str, Any] = dict.fromkeys(Inputs._fields)
    format, size = None, K
    if isinstance(rhs, QuantizedTensor):
        experts, format, size = stored_experts(rhs)
        arrays |= experts
    else:
        arrays["rhs"] = rhs
    arrays |= {"lhs": lhs, "group_sizes": group_sizes}
    arrays |= {"gather": gather, "scatter": scatter, "weights": weights}
    arrays["rows_of"] = _check_rows_of(rows_of, arrays, out_rows, M)
    return Inputs(**arrays), Spec(format, size, K, out_rows)


def stored_experts(w: QuantizedTensor) -> tuple[dict[str, Any], Format, int]:
    """The arrays of experts [E, K, N] by their names in `Inputs`, the format, and rows that share a scale."""
    E = w.shape[0]
    if any(x.shape[0] != E for x in jax.tree.leaves(w)):
        shapes = [list(x.shape) for x in jax.tree.leaves(w)]
        raise ValueError(f"rhs: got arrays {shapes}; expected {E} in front of each, one for each expert")
    static: list[Any] = []

    def of_one(w: QuantizedTensor) -> dict[str, Any]:
        arrays, *static[:] = packed.stored(w)
        return arrays

    arrays = jax.vmap(of_one)(w)
    format, size = static
    return arrays, format, size


def shape(call: Inputs, spec: Spec) -> tuple[int, int, int, int]:
    """E, M, K, N of the product: M sorted rows times experts [E, K, N]."""
    columns = call.rhs if call.rhs is not None else call.codes
    assert columns is not None
    rows = call.lhs if call.gather is None else call.gather
    return columns.shape[0], rows.shape[0], spec.K, columns.shape[2]


def argument_axes(call: Inputs, spec: Spec) -> Inputs:
    """The axes of every array: columns of the experts may be split, all else is whole."""

    def axes(name: str, x: Array | None) -> str | None:
        if x is None:
            return None
        own = [f"{name}{i}" for i in range(x.ndim)]
        has_columns = name in ("rhs", "codes", "scales", "zeros", "choices")
        return " ".join([*own[:-1], "n"] if has_columns else own)

    return Inputs(*(axes(name, x) for name, x in call._asdict().items()))


def result_axes(call: Inputs, spec: Spec) -> str:
    """The axes of the result."""
    return "rows n"


def _check_integers(name: str, x: Array, size: int) -> None:
    if x.shape != (size,) or not jnp.issubdtype(x.dtype, jnp.integer):
        reject(name, x, f"integers [{size}]")


def _check_scatter(M: int, scatter: Array | None, weights: Array | None, out_rows: int | None) -> None:
    if (scatter is None) != (out_rows is None):
        given = "none" if scatter is None else f"{list(scatter.shape)}"
        raise ValueError(f"out_rows: got {out_rows} and scatter {given}; expected both or neither")
    if out_rows is not None and (isinstance(out_rows, bool) or (known(out_rows) and out_rows < 1)):
        raise ValueError(f"out_rows: got {out_rows}; expected a number of rows >= 1")
    if scatter is not None:
        _check_integers("scatter", scatter, M)
    if weights is not None:
        if scatter is None:
            reject("weights", weights, "None without scatter")
        if weights.shape != (M,) or not jnp.issubdtype(weights.dtype, jnp.floating):
            reject("weights", weights, f"floats [{M}]")


def _check_rows_of(rows_of: Array | None, call: dict[str, Any], out_rows: int | None, M: Any) -> Array | None:
    if rows_of is None:
        return None
    maps = [(call["gather"], call["lhs"].shape[0]), (call["scatter"], out_rows)]
    maps = [(index, tokens) for index, tokens in maps if index is not None]
    if not maps:
        reject("rows_of", rows_of, "None without gather and scatter")
    (_, T), *more = maps
    if any(tokens != T for _, tokens in more):
        reject("rows_of", rows_of, f"as many rows of lhs as out_rows, got {[T, out_rows]}")
    if rows_of.ndim != 2 or rows_of.shape[0] != T or not jnp.issubdtype(rows_of.dtype, jnp.integer):
        reject("rows_of", rows_of, f"integers [{T}, most rows of a token]")
    rows_of = jnp.where((rows_of >= 0) & (rows_of < M), rows_of, M).astype(jnp.int32)
    token = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], rows_of.shape)
    found = jnp.full(M, T, jnp.int32).at[rows_of].set(token, mode="drop")
    times = jnp.zeros(M, jnp.int32).at[rows_of].add(1, mode="drop")
    real = jnp.arange(M, dtype=jnp.int32) < jnp.sum(call["group_sizes"], dtype=jnp.int32)
    for index, _ in maps:  # the rows are those that the map sends to the token, each once
        right = jnp.all(((found == index) & (times <= 1)) | ~real)
        problem = "rows_of: a row of a token is left out, repeated or another's; expected each once"
        if isinstance(right, jax.core.Tracer):
            checkify.debug_check(right, problem)
        elif not right:
            raise ValueError(problem)
    return rows_of


def _within(sizes: Array, M: int) -> Array:
    """Sizes in int32 of groups within M rows: an error outside of jit where they are not, cut inside."""
    if not isinstance(sizes, jax.core.Tracer):
        total = int(np.sum(np.asarray(sizes), dtype=np.int64))
        if (np.asarray(sizes) < 0).any() or total > M:
            raise ValueError(f"group_sizes: got {sizes.tolist()}; expected sizes >= 0, {M} rows at most")
        return sizes.astype(jnp.int32)
    if jnp.iinfo(sizes.dtype).max > jnp.iinfo(jnp.int32).max:  # the cast could wrap
        sizes = jnp.clip(sizes, -1 if jnp.issubdtype(sizes.dtype, jnp.signedinteger) else 0, M + 1)
    sizes = sizes.astype(jnp.int32)
    ends = jnp.cumsum(jnp.clip(sizes, 0, M), dtype=jnp.int32)
    ends = jnp.where(jnp.cumsum(ends > M) > 0, M, ends)  # what comes after the first past M may be wrapped
    checkify.debug_check(
        jnp.all(sizes >= 0) & jnp.all(jnp.diff(ends, prepend=0) == sizes),
        "group_sizes: a size is negative, or their sum is past the rows; expected >= 0 and at most M",
    )
    return jnp.diff(ends, prepend=jnp.zeros_like(ends[:1]))


def _indices(name: str, index: Array | None, size: Any) -> Array | None:
    """Row numbers in int32; `size`, one past the last row, where a number is of no row."""
    if index is None:
        return None
    if not isinstance(index, jax.core.Tracer):
        numbers = np.asarray(index)
        if (numbers < 0).any() or (numbers >= size).any():
            raise ValueError(f"{name}: got {numbers.min()} to {numbers.max()}; expected 0 to {size} - 1")
        return index.astype(jnp.int32)
    right = (index >= 0) & (index < size)
    checkify.debug_check(jnp.all(right), f"{name}: a row is out of range; expected 0 to the last row")
    return jnp.where(right, index.astype(jnp.int32), size)
