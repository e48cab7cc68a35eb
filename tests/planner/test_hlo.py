"""Collectives read from compiled programs: kinds, bytes, axes and how often."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from frugax.planner import hlo
from frugax.planner.program import nbytes, parse
from tests.devices import run_on_eight_devices


def test_collectives_on_eight_devices_are_the_known_ones():
    run_on_eight_devices("tests.planner.collective_calls")


@pytest.mark.parametrize(
    ("attribute", "groups"),
    [
        ("{{0,3},{1,2}}", [[0, 3], [1, 2]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=2,'c'=2] {'c','a'}", [[0, 4, 1, 5], [2, 6, 3, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_groups_are_read_in_every_form(attribute, groups):
    assert hlo.device_groups(f", channel_id=3, replica_groups={attribute}, dimensions={{0}}", 8) == groups


LOOP = """HloModule m
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(LAST)
  ROOT %c = pred[] compare(%i, %n), direction=DIRECTION
}
%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0:T(128)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%q), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%q), index=1
  %s = s32[] constant(STEP)
  %j = s32[] add(%i.1, %s)
  %y = f32[8]{0:T(128)} all-reduce(%x), replica_groups={}, to_apply=%sum
  ROOT %t = (s32[], /*index=1*/f32[8]{0:T(128)}) tuple(%j, %y)
}
ENTRY %main (z: f32[8]) -> f32[8] {
  %z = f32[8] parameter(0)
  %o = s32[] constant(FIRST)
  %o.1 = s32[] copy(%o)
  %u = (s32[], f32[8]) tuple(%o.1, %z)
  %w = (s32[], f32[8]) while(%u), condition=%cond, body=%body
  ROOT %r = f32[8] get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize(
    ("first", "last", "step", "direction", "times"),
    [(0, 7, 1, "LT", 7), (2, 7, 2, "LT", 3), (2, 8, 2, "LE", 4), (9, 0, -1, "GE", 10), (0, 5, 1, "NE", 5)],
)
def test_trips_follow_from_the_condition(first, last, step, direction, times):
    text = LOOP.replace("FIRST", str(first)).replace("LAST", str(last)).replace("STEP", str(step))
    (one,) = hlo.collectives(text.replace("DIRECTION", direction), {"x": 4})
    assert (one.times, one.exact, one.payload_bytes, one.wire_bytes) == (times, True, 32, 48)


def test_a_loop_that_ends_by_data_counts_once_and_says_so():
    text = LOOP.replace("constant(LAST)", "custom-call(%p)").replace("FIRST", "0").replace("STEP", "1")
    (one,) = hlo.collectives(text.replace("DIRECTION", "LT"), {"x": 4})
    assert (one.times, one.exact) == (1, False)


def test_sizes_and_bad_text():
    assert nbytes("(bf16[3,5]{1,0:T(8,128)(2,1)S(1)}, u32[], f8e4m3fn[7], s4[3], token[])") == 30 + 4 + 7 + 2
    with pytest.raises(ValueError, match=r"text: got 'func'\.\.\.; expected compiled\.as_text\(\)"):
        parse("func")


@pytest.mark.deviceless
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_collectives_of_a_tpu_program_are_the_known_ones():
    """A scan of gathered layers on v5e:2x2; the compiler leaves no note of its trips."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.array(topology.devices).reshape(2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def body(w, x):
        layer = lambda x, w: (jnp.tanh(x @ jax.lax.all_gather(w, "b", tiled=True)), None)  # noqa: E731
        return jax.lax.psum_scatter(jax.lax.scan(layer, x, w)[0], "a", tiled=True)

    f = jax.shard_map(body, mesh=mesh, in_specs=(P(None, "b"), P("a")), out_specs=P("a"), check_vma=False)
    place = lambda shape, *spec: jax.ShapeDtypeStruct(  # noqa: E731
        shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, P(*spec))
    )
    text = jax.jit(f).lower(place((9, 512, 512), None, "b"), place((512, 512), "a")).compile().as_text()
    assert "known_trip_count" not in text
    assert " while(" in text
    w, x = 512 * 512 * 2, 256 * 512 * 2
    found = {
        (c.kind, c.axes, c.payload_bytes, c.wire_bytes, c.times, c.exact) for c in hlo.collectives(text, mesh)
    }
    assert found == {
        ("all-gather", ("b",), w, w // 2, 9, True),
        ("reduce-scatter", ("a",), x, x // 2, 1, True),
    }
