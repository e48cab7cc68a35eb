"""Packed experts in the product: each is decoded in fast memory when the first of its rows comes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...common.tpu import F32, Launch
from ...quantized_matmul import pallas_tpu as quantized
from ...quantized_matmul.inputs import Spec as OneSpec
from ...quantized_matmul.pallas_tpu.kernels import Kind, Product
from ...quantized_matmul.pallas_tpu.tiles import Tiles
from ..decode import expert, stored
from ..inputs import Inputs, Spec


def unsupported_reason(call: Inputs, spec: Spec) -> str | None:
    """Why packed experts can't be decoded here; None if they can."""
    return quantized.unsupported_reason(*_of_one(call, spec))


def blocks(call: Inputs, spec: Spec, transposed: bool) -> tuple[dict[str, Any], int]:
    """The facts of packed experts for `for_product`, and their K in whole packing blocks."""
    one, of_one = _of_one(call, spec)
    size, bits = quantized.sizes_of(one, of_one), of_one.format.bits
    strip = (2 * 5 + 8) * size.groups  # bytes of a column's scales and zeros, as stored and as decoded
    if not transposed:
        return {"stored": size.K * bits // 8, "fixed": 1024 * strip}, size.K
    blocks = size.K // size.block
    wide = [n * size.block for n in range(1, blocks + 1) if blocks % n == 0]
    return {"stored": size.N * bits // 8, "fixed": size.N * strip, "wide": wide}, size.K


@dataclass(frozen=True)
class Packed:
    """Experts as they are stored, in whole packing blocks; kernels see one after the other."""

    arrays: dict[str, Array]  # [E, ...] each
    spec: OneSpec
    size: quantized.Sizes

    @classmethod
    def of(cls, call: Inputs, spec: Spec) -> "Packed":
        """The packed experts of a call."""
        one, of_one = _of_one(call, spec)
        size = quantized.sizes_of(one, of_one)

        def arrange(arrays: dict[str, Array]) -> dict[str, Array]:
            return quantized.arranged(expert(arrays, spec)[0], of_one, size, size.groups)

        return cls(jax.vmap(arrange)(stored(call)), of_one, size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, K and N, K of whole blocks."""
        return self.arrays["codes"].shape[0], self.size.K, self.size.N

    def read(
        self, launch: Launch, columns: int, dtype: Any, transposed: bool, interpret: bool
    ) -> Callable[..., None]:
        """Add what a visit reads, `columns` of the product wide, and give the function that decodes it.

        The kernel has the decoded matrix in `w_ref`, and calls the function with all refs that it does not
        know.
        """
        size, bits = self.size, self.spec.format.bits
        tiles = Tiles(self.spec.format, size.block, size.group, 3 if dtype == F32 else 1, interpret)
        depth, wide = (columns, size.N) if transposed else (size.K, columns)
        p = Product(tiles, Kind.SCALED, 1, 1, blocks=depth // size.block, steps=1, columns=size.N, wide=wide)

        def codes(n: Any, v: Any, group: Any, *_: Any) -> tuple[Any, ...]:
            return (group[v], n, 0) if transposed else (group[v], 0, n)

        def groups(n: Any, v: Any, group: Any, *_: Any) -> tuple[Any, ...]:
            return group[v], 0, 0 if transposed else n

        def one(n: Any, v: Any, group: Any, *_: Any) -> tuple[Any, ...]:
            return group[v], 0, 0

        launch.add("codes", self.arrays["codes"], pl.BlockSpec((None, depth * bits // 8, wide), codes))
        for name in ("scales", "zeros", "choices"):
            if name in self.arrays:
                launch.add(name, self.arrays[name], pl.BlockSpec((None, size.groups, wide), groups))
                launch.hold(name.removesuffix("s"), (size.groups, wide))
        for name in ("outer", "offset"):
            if name in self.arrays:
                block = pl.BlockSpec((None, 1, 1), one, memory_space=pltpu.SMEM)
                launch.add(name, self.arrays[name], block)
        launch.hold("w", (depth, wide), dtype)
        return partial(_decode, p, transposed)


def _decode(
    p: Product, transposed: bool, *, n, w_ref, codes_ref, scales_ref, scale_ref, zeros_ref=None,
    zero_ref=None, outer_ref=None, offset_ref=None, choices_ref=None, choice_ref=None,
):  # fmt: skip
    """Fill `w` for step n along the columns of the product."""
    scale_ref[...] = p.scales(scales_ref, outer_ref, offset_ref)
    if zero_ref is not None:
        zero_ref[...] = zeros_ref[...].astype(jnp.int32).astype(F32)
    if choices_ref is not None:
        choice_ref[...] = p.specials(choices_ref)
    size = p.tiles.block

    def visit(i: Any) -> None:
        (parts,) = p.tiles_of(
            codes_ref, i, n * p.blocks if transposed else 0, scale_ref, zero_ref, choice_ref
        )
        value = parts[0]
        for part in parts[1:]:
            value = value.astype(F32) + part.astype(F32)
        w_ref[pl.ds(pl.multiple_of(i * size, size), size), :] = value.astype(w_ref.dtype)

    p.each_block(visit)


def _of_one(call: Inputs, spec: Spec) -> tuple[Any, OneSpec]:
    """Shapes of one expert's product with a register of rows, as a call of `quantized_matmul`."""
    of_one = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in stored(call).items()}
    one, one_spec = expert(of_one, spec)
    return one._replace(x=jax.ShapeDtypeStruct((16, spec.K), call.lhs.dtype)), one_spec
