"""Run by test_hlo.py on eight devices: collectives read from programs whose traffic is known."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from frugax.planner import hlo


def body(w, x):
    def layer(x, w):
        x = jnp.tanh(x @ jax.lax.all_gather(w, "b", tiled=True))
        return jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]), None

    def twice(x, _):
        return jax.lax.scan(layer, x, w)[0], None

    x, _ = jax.lax.scan(twice, x, None, length=2)
    return (
        jax.lax.psum(x, ("a", "b")),
        jax.lax.psum_scatter(x, "b", tiled=True),
        jax.lax.all_to_all(x, "a", 0, 1, tiled=True),
        jax.lax.psum(x[0], "c"),
    )


def main():
    mesh = jax.make_mesh((2, 4, 1), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    specs = (P(None, "b"), P("a")), (P(), P("b"), P(("a", "b")), P())
    f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False))
    structs = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
    text = f.lower(*structs).compile().as_text()
    found = hlo.collectives(text, mesh)
    x, w = 8 * 16 * 4, 16 * 16 * 4  # bytes of a device's rows, and of one layer
    summary = {(c.kind, c.axes, c.group_size, c.payload_bytes, c.wire_bytes, c.times, c.exact) for c in found}
    assert summary == {
        ("all-gather", ("b",), 4, w, w * 3 // 4, 10, True),
        ("collective-permute", ("b",), 2, x, x, 10, True),
        ("all-reduce", ("a", "b"), 8, x, x * 7 // 4, 1, True),
        ("reduce-scatter", ("b",), 4, x, x * 3 // 4, 1, True),
        ("all-to-all", ("a",), 2, x, x // 2, 1, True),
    }, summary
    assert len(found) == 5
    # Without the compiler's own notes the trips follow from the loops' conditions.
    bare = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert bare != text
    assert hlo.collectives(bare, mesh) == found


main()
