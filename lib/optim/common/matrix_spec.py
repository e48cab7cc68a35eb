"""Rules by which leaves of a params tree are matrices, and their axes rows, columns or batch."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from .containers import Names, named_leaves
from .leaf_names import MATRICES, PLAIN, is_plain, is_vector

SIDES = ("short", "long", "rows", "cols", "unsharded")
BY_DEFAULT = "its name and shape"  # the reason why a leaf is a matrix that no rule names
LEAST_SIDE = 32  # of a matrix by an unusual name


class MatrixAxes(NamedTuple):
    """A leaf's row and column axes; the others are batch: every slice along them is a matrix of its own.

    Example:
        >>> from frugax.optim import MatrixAxes
        >>> MatrixAxes(rows=(0,), cols=(1, 2))  # a projection [width, heads, head size]
        MatrixAxes(rows=(0,), cols=(1, 2))
    """

    rows: tuple[int, ...] = (-2,)
    cols: tuple[int, ...] = (-1,)


LAST_TWO = MatrixAxes()

# A rule's value for leaves [layers, ...] of any rank: each layer is a matrix, or is treated as one.
STACKED = MatrixAxes((), ())


class View(NamedTuple):
    """A leaf's layout as matrices [..., m, n], where m is the side that projectors shorten."""

    axes: MatrixAxes  # of the leaf, all non-negative
    shape: tuple[int, ...]  # of the leaf
    swapped: bool  # columns are the projected side

    @property
    def batch(self) -> tuple[int, ...]:
        """The leaf's batch axes."""
        taken = self.axes.rows + self.axes.cols
        return tuple(axis for axis in range(len(self.shape)) if axis not in taken)

    @property
    def order(self) -> tuple[int, ...]:
        """The leaf's axes in the order of the view."""
        rows, cols = self.axes
        return self.batch + (cols + rows if self.swapped else rows + cols)

    @property
    def matrices(self) -> tuple[int, ...]:
        """[..., m, n]"""
        m, n = (math.prod(self.shape[axis] for axis in axes) for axes in self.axes)
        return (*(self.shape[axis] for axis in self.batch), *((n, m) if self.swapped else (m, n)))

    @property
    def is_like_heads(self) -> bool:
        """True for shapes such as [width, heads, head size]: the axis before the matrices is the longest."""
        return bool(self.batch) and self.shape[self.batch[-1]] > max(self.matrices[-2:])

    def split(self, x: Array) -> Array:
        """The leaf as matrices."""
        return jnp.transpose(x, self.order).reshape(self.matrices)

    def join(self, x: Array) -> Array:
        """Matrices back in the leaf's layout; the inverse of `split`."""
        x = x.reshape(tuple(self.shape[axis] for axis in self.order))
        return jnp.transpose(x, tuple(self.order.index(axis) for axis in range(len(self.shape))))


class Decision(NamedTuple):
    """A spec's decision for one leaf."""

    path: str
    view: View | None  # None: no matrix
    why: str


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    r"""Rules for which leaves are matrices: your own first, then by name, shape and size.

    Without rules, a leaf is a matrix where it has two axes or more and no word of its path says that it is an
    embedding, a head, a norm, a bias or a convolution. Words are whole and of any case: `LayerNorm_0` is a
    norm, `normal_mlp` is none. A leaf named kernel, weight, w or w1, w2... needs sides of at least
    `min_side`, any other name sides of at least 32, which stacked vectors seldom have.

    Its last two axes are rows and columns; those before them, which `nn.scan` or experts bring, are batch.
    That is right for kernels [in, out], stacked or not. A kernel of more axes (`nn.DenseGeneral`, attention)
    needs a rule to be seen as it should be; a warning says what such a kernel costs without one.

    Args:
      rules: regexes of the path, each with `MatrixAxes` or None for no matrix; the first that is found in
        "a/b/c" decides. Each must match something.
      names: regex that a leaf's own name must match in full; None: the names above.
      plain: regex that must not be found in the path, which is written in words for it, such as
        "encoder/layer norm 0/scale".
      min_side: matrices with a shorter side below it are no matrices.
      clamp: lower a rank to the shorter side where it is above it, instead of raising.
      partition: regexes, each with a PartitionSpec, for `side="unsharded"`; the first that is found decides.
      axes: of leaves that no rule names. Rows are a layer's inputs and columns its outputs, as in kernels
        [in, out]; for weights [out, in], as Equinox and PyTorch have them, say
        `MatrixAxes(rows=(-1,), cols=(-2,))`. It matters where an optimizer or a `side` tells inputs from
        outputs: to `trion`, "rows", "cols", and to square matrices.

    Raises:
      ValueError: a rule or an entry of `partition` matches nothing, or names axes the leaf doesn't have; no
        leaf at all is a matrix; a leaf isn't of floats.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"embedding": jnp.ones((9, 4)), "layers": {"out": {"kernel": jnp.ones((2, 6, 4))}}}
        >>> print(frugax.optim.MatrixSpec().table(params))
        leaf               shape      matrices        why
        embedding          [9, 4]     -               its name
        layers/out/kernel  [2, 6, 4]  2 of 4 x 6 (T)  its name and shape
    """

    rules: Mapping[str, MatrixAxes | None] | tuple = ()
    names: str | None = None
    plain: str = PLAIN
    min_side: int = 2
    clamp: bool = False
    partition: Mapping[str, PartitionSpec] | tuple = ()
    axes: MatrixAxes = LAST_TWO

    def __post_init__(self):
        for field in ("rules", "partition"):
            pairs = getattr(self, field)
            pairs = pairs.items() if isinstance(pairs, Mapping) else pairs
            object.__setattr__(self, field, tuple((pattern, value) for pattern, value in pairs))
        rules = [(pattern, axes and MatrixAxes(*map(tuple, axes))) for pattern, axes in self._pairs("rules")]
        object.__setattr__(self, "rules", tuple(rules))  # tuples throughout: a spec is a key of caches
        object.__setattr__(self, "axes", MatrixAxes(*map(tuple, self.axes)))

    def _pairs(self, field: str) -> tuple[tuple[str, Any], ...]:
        return getattr(self, field)

    def decisions(self, params: Any, side: str = "short") -> list[Decision]:
        """Decide for each leaf of `params`, in the tree's order.

        Args:
          params: any tree of arrays or shapes.
          side: which side of a matrix m is: "short", "long", "rows", "cols", or "unsharded" (the one that
            `partition` doesn't shard, else the short one), so that projecting it needs no collective.
        """
        return self.decisions_of(named_leaves(params), side)

    def decisions_of(self, leaves: list[tuple[Names, Any]], side: str) -> list[Decision]:
        """Decide as `decisions` does, for leaves with their names."""
        return list(_decisions(self, side, tuple(("/".join(names), x.shape, x.dtype) for names, x in leaves)))

    def _of_shapes(self, leaves: tuple[tuple[str, tuple[int, ...], Any], ...], side: str) -> list[Decision]:
        if side not in SIDES:
            raise ValueError(f"side: got {side!r}; expected one of {', '.join(SIDES)}")
        for path, shape, dtype in leaves:
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"params: got {dtype}{list(shape)} at {path}; expected floats")
        for field in ("rules", "partition"):
            for pattern, _ in self._pairs(field):
                if leaves and not any(re.search(pattern, path) for path, *_ in leaves):
                    paths = ", ".join(path for path, *_ in leaves)
                    raise ValueError(f"{field}: {pattern!r} matches no leaf; expected one of {paths}")
        found = [self._decide(path, shape, side) for path, shape, _ in leaves]
        if leaves and all(decision.view is None for decision in found):
            raise ValueError(
                "spec: no leaf is a matrix; expected rules that name some:\n"
                + _table(found, [shape for _, shape, _ in leaves])
            )
        return found

    def table(self, params: Any, side: str = "short") -> str:
        """Make a table of each leaf's matrices and the reason. "(T)": transposed, so that m comes first."""
        leaves = named_leaves(params)
        return _table(self.decisions_of(leaves, side), [leaf.shape for _, leaf in leaves])

    def _decide(self, path: str, shape: tuple[int, ...], side: str) -> Decision:
        for pattern, axes in self._pairs("rules"):
            if re.search(pattern, path):
                view = None if axes is None else self.view_of(path, shape, axes, side)
                return Decision(path, view, f"rule {pattern!r}")
        usual = re.fullmatch(self.names or MATRICES, path.split("/")[-1], re.IGNORECASE)
        if is_plain(path, self.plain) or not (usual or (self.names is None and not is_vector(path))):
            return Decision(path, None, "its name")
        if len(shape) < 2:
            return Decision(path, None, "its shape")
        least = self.min_side if usual else max(self.min_side, LEAST_SIDE)
        if min(shape[-2:]) < least:
            return Decision(path, None, f"a side below {least}")
        return Decision(path, self.view_of(path, shape, self.axes, side), BY_DEFAULT)

    def view_of(self, path: str, shape: tuple[int, ...], axes: MatrixAxes, side: str) -> View:
        """The view of a leaf with these axes."""
        if axes == STACKED and shape:
            axes = MatrixAxes(tuple(range(1, min(2, len(shape)))), tuple(range(2, len(shape))))
            return View(axes, tuple(shape), False)
        flat = axes.rows + axes.cols
        inside = all(-len(shape) <= axis < len(shape) for axis in flat)
        whole = tuple(axis % len(shape) for axis in flat) if inside and shape else ()
        if len(set(whole)) < len(flat) or not flat:
            raise ValueError(
                f"rules: got rows {axes.rows} and columns {axes.cols} for {path} of shape {list(shape)}; "
                "expected distinct axes of the leaf (a leaf named as a matrix has at least two)"
            )
        axes = MatrixAxes(whole[: len(axes.rows)], whole[len(axes.rows) :])
        m, n = (math.prod(shape[axis] for axis in part) for part in axes)
        if side == "unsharded":
            spec = next((tuple(p) for pattern, p in self._pairs("partition") if re.search(pattern, path)), ())
            sharded = [any(axis < len(spec) and spec[axis] is not None for axis in part) for part in axes]
            side = "short" if sharded[0] == sharded[1] else ("cols" if sharded[0] else "rows")
        swapped = {"short": m > n, "long": m < n, "rows": False, "cols": True}[side]
        return View(axes, tuple(shape), swapped)

    def rank(self, rank: int | float, most: int, view: View, path: str = "a leaf") -> int:
        """`rank`, if at most `most`; `most`, if not and `clamp` is set. A float is a share of `most`."""
        if most == 0:
            raise ValueError(
                f"projector: {path} of shape {list(view.shape)} is no stack; "
                "expected a rule of the spec that leaves it out"
            )
        if isinstance(rank, float):
            return round(rank * most)
        if rank <= most or self.clamp:
            return min(rank, most)
        raise ValueError(
            f"rank: got {rank}; expected 1 to {most} for {path} of shape {list(view.shape)} "
            "(or MatrixSpec(clamp=True), or a rule that leaves the leaf out or names its axes)"
        )


@functools.lru_cache(maxsize=64)
def _decisions(spec: MatrixSpec, side: str, leaves: tuple) -> list[Decision]:
    """`MatrixSpec.decisions` of paths, shapes and dtypes: asked at each trace, worked out once."""
    return spec._of_shapes(leaves, side)


def leaf_path(path: tuple) -> str:
    """A leaf's path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _table(decisions: list[Decision], shapes: list[tuple[int, ...]]) -> str:
    rows = [("leaf", "shape", "matrices", "why")]
    for (path, view, why), shape in zip(decisions, shapes, strict=True):
        seen = "-"
        if view is not None:
            *batch, m, n = view.matrices
            many = f"{math.prod(batch)} of " if batch else ""
            seen = f"{many}{m} x {n}{' (T)' if view.swapped else ''}"
        rows.append((path, str(list(shape)), seen, why))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ("  ".join((*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3])) for r in rows)
    return "\n".join(line.rstrip() for line in lines)
