"""A trained tree of params, packed by rules of paths."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..formats import Format, QuantizedTensor, format_named, quantize
from ..optim.common.matrix_spec import leaf_path

Packer = Callable[[str, Array], QuantizedTensor]
Rule = Format | str | tuple[Format | str, int] | Packer | None

# Stacked over depth, vectors look like a matrix; convolutions and rates are read entry by entry.
NO_MATRIX = re.compile(
    r"(^|/)((\w+_)?bias|[^/]*norm(/weight|/scale)?|conv/\w+|A_log|[BCD]|mu(_\w)?|decay|bonus|theta|gain|scale)$"
)
ROWS_ARE_CONTRACTED = ("embedding", "head")  # [V, D]: their groups lie along the last axis


class PackedArray(NamedTuple):
    """One array of a packed tree: bytes and error.

    Attributes:
      path: in the tree, such as "layers/block_0/mixer/out/kernel".
      shape: of the array.
      format: the name of its format.
      bytes_before, bytes: that it took, and takes.
      error: rms of the change over the array's rms.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    bytes_before: int
    bytes: int
    error: float


@dataclasses.dataclass(frozen=True)
class PackedTable:
    """Bytes and errors of a packed tree; `print` shows them array by array.

    Attributes:
      arrays: those that were packed.
      bytes_kept: of those that were not.

    Example: see `quantize_params`.
    """

    arrays: tuple[PackedArray, ...]
    bytes_kept: int

    @property
    def bytes_before(self) -> int:
        """Bytes that the whole tree took."""
        return sum(row.bytes_before for row in self.arrays) + self.bytes_kept

    @property
    def bytes(self) -> int:
        """Bytes that the whole tree takes."""
        return sum(row.bytes for row in self.arrays) + self.bytes_kept

    def __str__(self) -> str:
        head = ("array", "shape", "format", "bytes before", "bytes", "relative error")
        lines = [
            (a.path, str(list(a.shape)), a.format, f"{a.bytes_before:,}", f"{a.bytes:,}", f"{a.error:.4f}")
            for a in self.arrays
        ]
        lines.append(("the rest", "", "", f"{self.bytes_kept:,}", f"{self.bytes_kept:,}", ""))
        lines.append(("all", "", "", f"{self.bytes_before:,}", f"{self.bytes:,}", ""))
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

        def written(line):
            cells = [
                c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            ]
            return "  ".join(cells).rstrip()

        return "\n".join(map(written, (head, *lines)))


def quantize_params(
    params: Any, rules: Mapping[str, Rule], *, partial_group: bool = True
) -> tuple[Any, PackedTable]:
    """Pack the arrays of a tree that rules name; the layers that ran the tree run the packed one.

    Every `Dense` and `BitLinear` takes a packed kernel, as do the other matrices of mixers, and `Decoder` an
    embedding and a head. Norms, biases, convolutions and gains stay arrays.

    Args:
      params: a tree of arrays, such as `variables["params"]`. Arrays [..., K, N] are cut in groups along K;
        those called "embedding" or "head", [V, D], along D. Axes in front, as a scan over depth adds them,
        are of separate matrices. What is packed already stays as it is.
      rules: {regular expression: format}, tried in this order on paths such as
        "layers/block_0/mixer/out/kernel"; the first that is found anywhere in a path counts. A format is a
        name or a value, a pair of one and a group size, a function (path, array) -> `QuantizedTensor`, or
        None, which leaves an array as it is.
      partial_group: whether the last group of an axis may be smaller; otherwise group sizes must divide.

    Returns:
      The packed tree, and a table of bytes and relative errors that prints well.

    Raises:
      ValueError: a rule counts for no array, names a bias, a norm or what else is no floating matrix, or is
        refused by `frugax.formats.quantize`; the array is named.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> model = frugax.layers.Decoder(vocab_size=16, width=64, blocks=(frugax.layers.Block("MLGRU"),))
        >>> tokens = jnp.array([[1, 2, 3]])
        >>> params = model.init(jax.random.key(0), tokens)["params"]
        >>> rules = {"channel/out/kernel$": None, "kernel$": ("int4", 32), "embedding": "int8"}
        >>> packed, table = frugax.quant.quantize_params(params, rules)
        >>> print(table)
        array                                  shape         format  bytes before   bytes  relative error
        embedding                              [16, 64]      int8           4,096   1,088          0.0060
        layers/block_0/channel/gate_in/kernel  [1, 64, 352]  int4          90,112  14,080          0.0809
        layers/block_0/mixer/fcg/kernel        [1, 64, 192]  int4          49,152   7,680          0.0824
        layers/block_0/mixer/out/kernel        [1, 64, 64]   int4          16,384   2,560          0.0818
        the rest                                                           46,336  46,336
        all                                                               206,080  71,744
        >>> logits, state = model.apply({"params": packed}, tokens)
    """
    if not rules:
        raise ValueError("rules: got none; expected {regular expression: format}")
    patterns = {pattern: _compiled(pattern) for pattern in rules}
    unused = set(rules)
    rows: list[PackedArray] = []
    kept = 0

    def pack(path, leaf):
        nonlocal kept
        name = leaf_path(path)
        pattern = next((p for p, found in patterns.items() if found.search(name)), None)
        unused.discard(pattern)
        rule = None if pattern is None else rules[pattern]
        if rule is None or isinstance(leaf, QuantizedTensor):
            kept += _bytes(leaf)
            return leaf
        try:
            q, error = _packed(name, leaf, rule, partial_group)
        except ValueError as problem:
            raise ValueError(f"rules: {pattern!r} found {name}: {problem}") from problem
        rows.append(PackedArray(name, leaf.shape, q.format.name, _bytes(leaf), q.nbytes, float(error)))
        return q

    packed = jax.tree_util.tree_map_with_path(pack, params, is_leaf=_is_packed)
    if unused:
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_packed)
        raise ValueError(
            f"rules: {sorted(unused)[0]!r} counts for no array; expected to find it, and no earlier rule, in "
            f"one of {', '.join(leaf_path(path) for path, _ in leaves)}"
        )
    return packed, PackedTable(tuple(rows), kept)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as problem:
        raise ValueError(f"rules: got {pattern!r}; expected a regular expression ({problem})") from problem


def _is_packed(x: Any) -> bool:
    return isinstance(x, QuantizedTensor)


def _bytes(x: Any) -> int:
    return x.nbytes


def _packed(name: str, x: Array, rule: Rule, partial_group: bool) -> tuple[QuantizedTensor, Array]:
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"got {x.dtype}{list(x.shape)}; expected a floating matrix [..., K, N]")
    if NO_MATRIX.search(name):
        raise ValueError(
            f"got {x.dtype}{list(x.shape)}, no matrix by its name; expected a rule None before it"
        )
    if callable(rule):
        q = rule(name, x)
        if not _is_packed(q) or q.shape != x.shape:
            raise ValueError(
                f"its function gave {type(q).__name__}; expected a QuantizedTensor {list(x.shape)}"
            )
        return q, _error(x, q)
    if isinstance(rule, tuple) and len(rule) != 2:
        raise ValueError(f"got {rule}; expected a pair of a format and a group size")
    format, group_size = rule if isinstance(rule, tuple) else (rule, None)
    axis = -1 if name.rpartition("/")[2] in ROWS_ARE_CONTRACTED else -2
    return _quantized(x, format_named(format), axis, group_size, partial_group)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantized(x, format, axis, group_size, partial_group):
    q = quantize(x, format, axis=axis, group_size=group_size, partial_group=partial_group)
    return q, _error(x, q)


@jax.jit
def _error(x: Array, q: QuantizedTensor) -> Array:
    x = x.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(x**2))
    return jnp.sqrt(jnp.mean((q.dequantize() - x) ** 2)) / jnp.where(size == 0, 1.0, size)
