"""Run by test_storage.py on eight devices: packed params lie as their arrays did, and nothing is gathered."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from frugax.formats import quantize

FORMATS = ("int3", "uint4", "bitmod4", "olive4", "nvfp4")
SPECS = {"columns": P(None, "model"), "stack": P("data", None, "model")}
SHAPES = {"columns": (96, 32), "stack": (2, 64, 16)}


def main():
    keys = jax.random.split(jax.random.key(0), 2)
    tree = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}

    def pack(tree):
        return {f: {n: quantize(x, f, axis=-2, group_size=16) for n, x in tree.items()} for f in FORMATS}

    def unpack(packed):
        return {f: {n: q.dequantize() for n, q in part.items()} for f, part in packed.items()}

    want = jax.jit(lambda tree: (packed := pack(tree), unpack(packed)))(tree)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
        at = {n: NamedSharding(mesh, spec) for n, spec in SPECS.items()}
        compiled = jax.jit(pack).lower(jax.tree.map(jax.device_put, tree, at)).compile()
        packed = compiled(jax.tree.map(jax.device_put, tree, at))
        assert "all-gather" not in compiled.as_text(), f"{kind}: a matrix is gathered"
        compiled = jax.jit(unpack).lower(packed).compile()
        back = compiled(packed)
        assert "all-gather" not in compiled.as_text(), f"{kind}: codes are gathered"
        for got, expected in zip(jax.tree.leaves((packed, back)), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(got, expected)
        for f in FORMATS:
            for n, spec in at.items():
                q = packed[f][n]
                assert q.shape == SHAPES[n]
                arrays = [q.codes, back[f][n], q.zeros, q.choices, q.scales]
                arrays[-1] = getattr(q.scales, "codes", q.scales)
                for x in arrays:
                    assert x is None or x.sharding.is_equivalent_to(spec, x.ndim), (kind, f, n, x.sharding)
        # A whole tensor goes where one sharding says, and back.
        q = want[0]["int3"]["columns"]
        moved = jax.device_put(q, at["columns"])
        assert moved.codes.sharding.is_equivalent_to(at["columns"], 2)
        assert moved.codes.addressable_shards[0].data.shape == (36, 8)
        np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize())(moved), want[1]["int3"]["columns"])


if __name__ == "__main__":
    main()
