"""Mesh axes chosen to split array axes, from names such as "b t h k" and how arrays already lie."""

import itertools
import math
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

MeshAxes = tuple[str, ...]


def sizes_of(names, shapes, independent) -> dict[str, set[int]]:
    """The sizes that each independent axis has."""
    sizes: dict[str, set[int]] = {factor: set() for factor in independent}
    for row, shape in zip(names, shapes, strict=True):
        for factor, size in zip(row, shape, strict=True):
            if factor in sizes:
                sizes[factor].add(size)
    return sizes


def choose(names, arrays, specs, sizes, mesh_shape) -> dict[str, MeshAxes]:
    """The mesh axes that split each independent axis, as the array longest along it, or largest, has them."""
    split: dict[str, MeshAxes] = dict.fromkeys(sizes, ())
    used: set[str] = set()
    for factor in sizes:
        found = [
            (
                x.shape[row.index(factor)],
                math.prod(x.shape),
                as_axes(dict(zip(row, spec, strict=False)).get(factor)),
            )
            for row, x, spec in zip(names, arrays, specs, strict=False)
            if factor in row
        ]
        for _, _, axes in sorted(found, key=lambda x: (-x[0], -x[1])):
            while axes and (used & set(axes) or not divides(axes, sizes[factor], mesh_shape)):
                axes = axes[:-1]
            if axes:
                split[factor] = axes
                used |= set(axes)
                break
    return split


def divides(axes: MeshAxes, sizes: set[int], mesh_shape) -> bool:
    """Say whether `axes` split the largest size evenly, and the first of them each smaller one down to 1."""
    parts, largest = _parts(axes, mesh_shape), max(sizes, default=0)
    if largest == 0 or largest % parts:
        return False
    return all(_parts(_first(axes, size, mesh_shape), mesh_shape) == min(size, parts) for size in sizes)


def _first(axes: MeshAxes, size: int, mesh_shape) -> MeshAxes:
    """The most of `axes`, from the first, that split `size` evenly: of 4 shards, pairs share 2 key heads."""
    return next(axes[:n] for n in range(len(axes), -1, -1) if size % _parts(axes[:n], mesh_shape) == 0)


def _parts(axes: MeshAxes, mesh_shape) -> int:
    return math.prod(mesh_shape[a] for a in axes)


def as_axes(entry: Any) -> MeshAxes:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def specs_of(names, shapes, split, mesh_shape) -> list[PartitionSpec]:
    return [
        PartitionSpec(
            *(_first(split.get(f, ()), n, mesh_shape) or None for f, n in zip(row, shape, strict=True))
        )
        for row, shape in zip(names, shapes, strict=True)
    ]


def sum_shards(results, specs, split) -> list[Array]:
    """Add up, over the shards that share it, every result that is not split as finely as the work was."""
    everywhere = [a for axes in split.values() for a in axes]
    out = []
    for x, spec in zip(results, specs, strict=True):
        shared = tuple(a for a in everywhere if all(a not in as_axes(entry) for entry in spec))
        out.append(jax.lax.psum(x, shared) if shared else x)
    return out


def shardy_rule(names, result_names, shapes, independent) -> tuple[str, dict[str, Any]]:
    """The rule as an einsum of factors: those to split, and those (all others) that shards need whole.

    Sizes 2 and 8 of one axis are the factors h0 = 2 and (h0 h1) = 2 x 4.
    """
    rows = [*names, *result_names]
    steps = {factor: _chain(sizes) for factor, sizes in sizes_of(rows, shapes, independent).items()}
    factor_sizes: dict[str, int] = {}
    alone: set[str] = set()
    whole: list[str] = []

    def dimension(name, size):
        parts, left = [], size
        for i, step in enumerate(steps.get(name, ())):
            if left % step == 0 and left > 1:
                parts.append(f"{name}{i}")
                factor_sizes[parts[-1]] = step
                left //= step
        if left > 1 or not parts:
            whole.append(f"whole{len(whole)}")
            factor_sizes[whole[-1]] = left
            parts.append(whole[-1])
        if len(parts) == 1:
            alone.add(parts[0])
            return parts[0]
        return f"({' '.join(parts)})"

    text = [
        " ".join(dimension(f, n) for f, n in zip(row, shape, strict=True))
        for row, shape in zip(rows, shapes, strict=True)
    ]
    options = {f: n for f, n in factor_sizes.items() if f not in alone}
    rule = ", ".join(text[: len(names)]) + " -> " + ", ".join(text[len(names) :])
    return rule, {"need_replication_factors": tuple(whole), **options}


def _chain(sizes: set[int]) -> list[int]:
    """Factors whose running products are the sizes, if each divides the next; else what divides them all."""
    ordered = [1, *sorted(sizes)]
    steps = [b // a for a, b in itertools.pairwise(ordered)]
    if any(b % a for a, b in itertools.pairwise(ordered)):
        steps = [math.gcd(*sizes)]
    return [step for step in steps if step > 1]
