"""Projectors: gradients G [..., m, n] to fewer rows R [..., r, n] and back, and what that takes to remember.

A projector is a frozen value with
  most(shape)             the largest possible rank
  init(shape)             what the state keeps, before the first refresh
  refresh(G, kept, key)   what it keeps from now on; called on refresh steps only, first of all on step 0
  down(G, kept, key)      R
  up(R, shape, kept, key) back to [..., m, n]
  change(old, new)        C with R_new ~ C R_old, for `moments="transport"`; ValueError where there is none
  together                all leaves refresh at the same steps with the same key

The key is the same from one refresh to the next, so a random projector draws itself again at each step
instead of being remembered. It is the same for all slices of a stacked leaf too: their gradients differ, so
nothing is lost, and a stack costs one draw.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from ...formats import quantize
from ..common.slicewise import eigenvectors, left_singular_vectors, orthonormal, slicewise


@runtime_checkable
class Projector(Protocol):
    """The interface of projectors that `low_rank` uses."""

    rank: Any
    together: Any

    def most(self, shape: tuple[int, ...]) -> int: ...
    def init(self, shape: tuple[int, ...], dtype: Any) -> Any: ...
    def refresh(self, g: Array, kept: Any, key: Any) -> Any: ...
    def down(self, g: Array, kept: Any, key: Any) -> Array: ...
    def up(self, r: Array, shape: tuple[int, ...], kept: Any, key: Any) -> Array: ...
    def change(self, old: Any, new: Any) -> Array: ...


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _rows(p: Array) -> Array:
    """P^T as an array of its own: with P in its place a CPU takes up to twice as long for either product."""
    return jax.lax.optimization_barrier(_t(p))


def _down(rows: Array, g: Array) -> Array:
    """P^T G."""
    return jnp.einsum("...rm,...mn->...rn", rows, g)


def _up(rows: Array, r: Array) -> Array:
    """P R."""
    return jnp.einsum("...rm,...rn->...mn", rows, r)


@dataclasses.dataclass(frozen=True)
class _Rowwise:
    """A projector of the m rows to `rank` rows."""

    rank: int | float
    together: ClassVar[bool] = False

    def most(self, shape: tuple[int, ...]) -> int:
        return shape[-2]


@dataclasses.dataclass(frozen=True)
class _Basis(_Rowwise):
    """An orthonormal basis P [..., m, r] that is found from the gradient and kept: R = P^T G.

    `format` names the number format that it is kept in, with one scale for each `group_size` of a column's
    entries; None is that of the gradient.
    """

    format: str | None = None
    group_size: int = 256

    def find(self, g: Array, p: Array, key: Any) -> Array:
        """P for the gradient g, p being the last one (zeros at first)."""
        raise NotImplementedError

    def pack(self, p: Array) -> Any:
        """Encode a basis for the state."""
        if self.format is None:
            return p
        return quantize(p, self.format, axis=-2, group_size=self.group_size)

    def unpack(self, kept: Any) -> Array:
        """Decode the basis in the state."""
        return kept if self.format is None else kept.dequantize()

    def init(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.pack(jnp.zeros((*shape[:-1], self.rank), dtype))

    def refresh(self, g: Array, kept: Any, key: Any) -> Any:
        return self.pack(self.look(g, self.unpack(kept), key))

    def look(self, g: Array, p: Array, key: Any) -> Array:
        """`find`, exactly, with each vector's sign, which is free, the nearer one to the last basis p."""
        with jax.default_matmul_precision("highest"):  # the gradient is squared in here
            new = self.find(g, p, key)
        return jnp.where(jnp.sum(new * p, axis=-2, keepdims=True) < 0, -new, new)

    def down(self, g: Array, kept: Any, key: Any) -> Array:
        return _down(_rows(self.unpack(kept)), g)

    def up(self, r: Array, shape: tuple[int, ...], kept: Any, key: Any) -> Array:
        return _up(_rows(self.unpack(kept)), r)

    def change(self, old: Any, new: Any) -> Array:
        return _t(self.unpack(new)) @ self.unpack(old)


@dataclasses.dataclass(frozen=True)
class SVD(_Basis):
    """The top left singular vectors of the gradient, by its decomposition. Keeps m * r numbers a matrix.

    Source: GaLore, Zhao et al. 2024 (arXiv 2403.03507).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> g = jnp.outer(jnp.arange(3.0), jnp.ones(5))  # rank 1: nothing is lost
        >>> p, key = frugax.optim.SVD(rank=1), jax.random.key(0)
        >>> kept = p.refresh(g, p.init(g.shape, g.dtype), key)
        >>> bool(jnp.allclose(p.up(p.down(g, kept, key), g.shape, kept, key), g, atol=1e-5))
        True
    """

    def find(self, g: Array, p: Array, key: Any) -> Array:
        return left_singular_vectors(g)[..., : self.rank]


@dataclasses.dataclass(frozen=True)
class Gram(_Basis):
    """The top left singular vectors of the gradient, as eigenvectors of G G^T: `SVD`'s, many times faster.

    Squaring costs digits: in float32, directions with less than 1e-7 of the largest one's energy are noise.
    Keeps m * r numbers a matrix.

    Source: GaLore, Zhao et al. 2024 (arXiv 2403.03507).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> g = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
        >>> p = frugax.optim.Gram(rank=1)
        >>> abs(p.refresh(g, p.init(g.shape, g.dtype), jax.random.key(0))[:, 0]).tolist()
        [0.0, 1.0, 0.0]
    """

    def find(self, g: Array, p: Array, key: Any) -> Array:
        return eigenvectors(g @ _t(g))[..., : self.rank]


@dataclasses.dataclass(frozen=True)
class RandomizedSVD(_Basis):
    """The top left singular vectors, nearly: a QR of G G^T ... G times a random matrix, and a small
    eigenproblem.

    Attributes:
      iterations: of G G^T; each lets the smaller singular values fade by their squared ratio to the larger.
      oversample: columns tried beyond the rank, and dropped.

    Source: Halko, Martinsson, Tropp 2011 (arXiv 0909.4061).

    Example:
        >>> import frugax
        >>> frugax.optim.RandomizedSVD(rank=8, iterations=1).oversample
        8
    """

    iterations: int = 2
    oversample: int = 8

    def find(self, g: Array, p: Array, key: Any) -> Array:
        tried = min(self.rank + self.oversample, *g.shape[-2:])
        tried = max(tried, self.rank)
        q = orthonormal(g @ jax.random.normal(key, (g.shape[-1], tried), g.dtype))
        for _ in range(self.iterations):
            q = orthonormal(g @ (_t(g) @ q))
        b = _t(q) @ g
        return q @ eigenvectors(b @ _t(b))[..., : self.rank]


@dataclasses.dataclass(frozen=True)
class PowerIteration(_Basis):
    """P <- QR(G G^T P): follows the leading subspace from refresh to refresh, from a random start.

    Attributes:
      iterations: how many at a refresh.

    Source: as in Dion (Ahn et al. 2025, arXiv 2504.05295) and COSMOS (2502.17410).

    Example:
        >>> import frugax
        >>> frugax.optim.PowerIteration(rank=8).iterations
        1
    """

    iterations: int = 1

    def find(self, g: Array, p: Array, key: Any) -> Array:
        start = jax.random.normal(key, p.shape[-2:], p.dtype)
        p = jnp.where(jnp.any(p != 0), p, start)
        for _ in range(self.iterations):
            p = orthonormal(g @ (_t(g) @ p))
        return p


@dataclasses.dataclass(frozen=True)
class _Forgetful(_Rowwise):
    """Drawn from the key at each step: nothing is kept, and nothing leads from one draw to the next."""

    def init(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return ()

    def refresh(self, g: Array, kept: Any, key: Any) -> Any:
        return ()

    def change(self, old: tuple, new: tuple) -> Array:
        raise ValueError(f"moments: {type(self).__name__} can't transport them; expected 'keep' or 'reset'")


@dataclasses.dataclass(frozen=True)
class Gaussian(_Forgetful):
    """Entries of N(0, 1 / r): norms of columns are kept in expectation; not orthonormal. Keeps nothing.

    Source: APOLLO, Zhu et al. 2024 (arXiv 2412.05270); the Johnson-Lindenstrauss lemma.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> frugax.optim.Gaussian(rank=2).down(jnp.ones((3, 5)), (), jax.random.key(0)).shape
        (2, 5)
    """

    def _draw(self, shape: tuple[int, ...], key: Array, dtype: Any) -> Array:
        """P^T [..., r, m], in the order of axes that a CPU multiplies with fastest."""
        p = jax.random.normal(key, (self.rank, shape[-2]), dtype) * self.rank**-0.5
        # One copy a slice: a product of one P with a stack would come out in another order of axes.
        return jnp.broadcast_to(p, (*shape[:-2], *p.shape))

    def down(self, g: Array, kept: Any, key: Any) -> Array:
        return _down(self._draw(g.shape, key, g.dtype), g)

    def up(self, r: Array, shape: tuple[int, ...], kept: Any, key: Any) -> Array:
        return _up(self._draw(shape, key, r.dtype), r)


def _drawn(count: int, rank: int, key: Any) -> tuple[Array, Array]:
    """`rank` of `count` indices in ascending order, and each index's place among them, -1 for the others."""
    indices = jnp.arange(count, dtype=jnp.int32)  # not of the default dtype, which would draw others
    chosen = jnp.sort(jax.random.permutation(key, indices)[:rank])
    return chosen, jnp.full(count, -1, jnp.int32).at[chosen].set(indices[:rank])


def _spread(r: Array, place: Array, axis: int) -> Array:
    """Rows of r in their places, zeros elsewhere, by a gather: XLA fuses that, and no scatter."""
    if r.shape[axis] == 0:
        return jnp.zeros((*r.shape[:axis], place.size, *r.shape[axis:][1:]), r.dtype)
    there = jnp.expand_dims(place, tuple(range(1, r.ndim - (axis % r.ndim)))) >= 0
    return jnp.where(there, jnp.take(r, jnp.maximum(place, 0), axis=axis), 0)


@dataclasses.dataclass(frozen=True)
class Rows(_Forgetful):
    """`rank` of the m rows, drawn at random (columns of the matrix, where those are the short side).

    Source: the column-wise split of FRUGAL, Zmushko et al. 2024 (arXiv 2411.07837).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> r = frugax.optim.Rows(rank=2).down(jnp.eye(3), (), jax.random.key(0))
        >>> r.sum()
        Array(2., dtype=float32)
    """

    def down(self, g: Array, kept: Any, key: Any) -> Array:
        chosen, _ = _drawn(g.shape[-2], self.rank, key)
        return jnp.take(g, chosen, axis=-2, unique_indices=True, indices_are_sorted=True)

    def up(self, r: Array, shape: tuple[int, ...], kept: Any, key: Any) -> Array:
        _, place = _drawn(shape[-2], self.rank, key)
        return _spread(r, place, -2)


@dataclasses.dataclass(frozen=True)
class Coordinates(_Forgetful):
    """`rank` random entries of each column: a random set of rows, turned by a random amount in each column.

    FRUGAL draws entries of the whole matrix; one count for each column makes their place a few integers that
    need no keeping.

    Source: the coordinate split (RandK) of FRUGAL, Zmushko et al. 2024 (arXiv 2411.07837).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> frugax.optim.Coordinates(rank=2).down(jnp.ones((3, 5)), (), jax.random.key(0)).shape
        (2, 5)
    """

    def _draw(self, m: int, n: int, key: Any) -> tuple[Array, Array, Array]:
        of_rows, of_turns = jax.random.split(key)
        return *_drawn(m, self.rank, of_rows), jax.random.randint(of_turns, (1, n), 0, m, jnp.int32)

    def down(self, g: Array, kept: Any, key: Any) -> Array:
        m, n = g.shape[-2:]
        chosen, _, turn = self._draw(m, n, key)
        rows = (chosen[:, None] + turn) % m
        return jnp.take_along_axis(g, jnp.broadcast_to(rows, (*g.shape[:-2], *rows.shape)), axis=-2)

    def up(self, r: Array, shape: tuple[int, ...], kept: Any, key: Any) -> Array:
        m, n = shape[-2:]
        _, place, turn = self._draw(m, n, key)
        place = place[(jnp.arange(m)[:, None] - turn) % m]
        rows = jnp.broadcast_to(jnp.maximum(place, 0), (*r.shape[:-2], m, n))
        if self.rank == 0:
            return jnp.zeros(shape, r.dtype)
        return jnp.where(place < 0, 0, jnp.take_along_axis(r, rows, axis=-2))


@dataclasses.dataclass(frozen=True)
class Slices(_Forgetful):
    """`rank` of a stack's slices whole, drawn at random; all leaves draw the same ones.

    Source: LISA, Pan et al. 2024 (arXiv 2403.17919), which trains a few layers at a time; the blocks of BAdam
    (Luo et al. 2024, 2404.02827) and FRUGAL (2411.07837).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> frugax.optim.Slices(rank=2).down(jnp.ones((6, 3, 5)), (), jax.random.key(0)).shape
        (2, 3, 5)
    """

    together: ClassVar[bool] = True

    def most(self, shape: tuple[int, ...]) -> int:
        return shape[0] if len(shape) > 2 else 0

    def down(self, g: Array, kept: Any, key: Any) -> Array:
        chosen, _ = _drawn(g.shape[0], self.rank, key)
        return jnp.take(g, chosen, axis=0, unique_indices=True, indices_are_sorted=True)

    def up(self, r: Array, shape: tuple[int, ...], kept: Any, key: Any) -> Array:
        _, place = _drawn(shape[0], self.rank, key)
        return _spread(r, place, 0)


@dataclasses.dataclass(frozen=True)
class DCT(_Rowwise):
    """The columns of the orthonormal cosine basis that carry most of the gradient. Keeps r integers a matrix.

    Source: Modoranu et al. 2025 (arXiv 2505.17967).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> p = frugax.optim.DCT(rank=1)
        >>> g = jnp.ones((4, 5))  # constant along rows: the cosine of frequency 0
        >>> p.refresh(g, p.init(g.shape, g.dtype), jax.random.key(0))
        Array([0], dtype=int32)
    """

    def init(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.zeros((*shape[:-2], self.rank), jnp.int32)

    def refresh(self, g: Array, kept: Array, key: Any) -> Array:
        return self.choose(g)

    def choose(self, g: Array) -> Array:
        """The columns that g has most of, in ascending order."""
        return jnp.sort(jax.lax.top_k(slicewise(self._energies, g), self.rank)[1], axis=-1)

    def _energies(self, g_MN: Array) -> Array:
        """The squared norm of each column's product with g_MN.

        Even columns are mirrored at the middle, odd ones too but for the sign: either needs half the rows.
        """
        m = g_MN.shape[0]
        half = m // 2
        top, middle, bottom = g_MN[:half], g_MN[half : m - half], g_MN[m - half :][::-1]
        even = self.basis(m, jnp.arange(0, m, 2), g_MN.dtype)[: m - half]
        odd = self.basis(m, jnp.arange(1, m, 2), g_MN.dtype)[:half]  # zero in the middle, if there is one
        even_parts = _down(_rows(even), jnp.concatenate([top + bottom, middle]))
        odd_parts = _down(_rows(odd), top - bottom)
        energies = jnp.zeros(m, g_MN.dtype).at[::2].set(jnp.sum(even_parts**2, axis=-1))
        return energies.at[1::2].set(jnp.sum(odd_parts**2, axis=-1))

    def basis(self, m: int, kept: Array, dtype: Any) -> Array:
        """The chosen columns [..., m, r]."""
        k = kept[..., None, :]
        scale = jnp.where(k == 0, m**-0.5, (2 / m) ** 0.5).astype(dtype)
        odd = (2 * jnp.arange(m) + 1).reshape(*[1] * (k.ndim - 2), m, 1)
        turns = odd * k % (4 * m)  # whole turns drop out before they cost digits
        return scale * jnp.cos((jnp.pi / (2 * m)) * turns.astype(dtype))

    def down(self, g: Array, kept: Array, key: Any) -> Array:
        return _down(_rows(self.basis(g.shape[-2], kept, g.dtype)), g)

    def up(self, r: Array, shape: tuple[int, ...], kept: Array, key: Any) -> Array:
        return _up(_rows(self.basis(shape[-2], kept, r.dtype)), r)

    def change(self, old: Array, new: Array) -> Array:
        return new[..., :, None] == old[..., None, :]
