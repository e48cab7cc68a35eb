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
from frugax.planner.visits import visits
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


WORDS = """HloModule m
%cond (p: (u32[], u32[], f32[8])) -> pred[] {
  %p = (u32[], u32[], f32[8]) parameter(0)
  %hi = u32[] get-tuple-element(%p), index=1
  %lo = u32[] get-tuple-element(%p), index=0
  %nhi = u32[] constant(0)
  %n = u32[] constant(LAST)
  %zero = s32[] constant(0)
  %signed = s32[] bitcast-convert(%hi)
  %less = pred[] compare(%signed, %zero), direction=BELOW
  %same = pred[] compare(%hi, %nhi), direction=EQ
  %below = pred[] compare(%lo, %n), direction=BELOW
  %both = pred[] and(%same, %below)
  ROOT %c = pred[] or(%less, %both)
}
%body (q: (u32[], u32[], f32[8])) -> (u32[], u32[], f32[8]) {
  %q = (u32[], u32[], f32[8]) parameter(0)
  %lo.1 = u32[] get-tuple-element(%q), index=0
  %hi.1 = u32[] get-tuple-element(%q), index=1
  %x = f32[8] get-tuple-element(%q), index=2
  %s = u32[] constant(STEP)
  %shi = u32[] constant(HIGH)
  %one = u32[] constant(1)
  %lo.2 = u32[] add(%lo.1, %s)
  %carry = pred[] compare(%lo.2, %lo.1), direction=LT
  %hi.2 = u32[] add(%hi.1, %shi)
  %hi.3 = u32[] add(%hi.2, %one)
  %hi.4 = u32[] select(%carry, %hi.3, %hi.2)
  %y = f32[8] all-reduce(%x), replica_groups={}, to_apply=%sum
  ROOT %t = (u32[], u32[], f32[8]) tuple(%lo.2, %hi.4, %y)
}
ENTRY %main (z: f32[8]) -> f32[8] {
  %z = f32[8] parameter(0)
  %o = u32[] constant(FIRST)
  %ohi = u32[] constant(0)
  %u = (u32[], u32[], f32[8]) tuple(%o, %ohi, %z)
  %w = (u32[], u32[], f32[8]) while(%u), condition=%cond, body=%body
  ROOT %r = f32[8] get-tuple-element(%w), index=2
}
"""
DOWN = 2**32 - 2, 2**32 - 1  # the words of -2


@pytest.mark.parametrize(
    ("first", "last", "step", "below", "times"),
    [
        (0, 9, (1, 0), "LT", 9),
        (2, 9, (2, 0), "LT", 4),
        (3, 3, (1, 0), "LT", 0),
        (0, 2**20 + 1, (1, 0), "LT", 2**20 + 1),
        (10, 0, DOWN, "GT", 5),
        (9, 0, DOWN, "GT", 5),  # ends below zero
        (0, 9, (0, 0), "LT", None),  # for ever
        (0, 9, (1, 1), "LT", 1),  # the high word ends it
        (2**32 - 4, 2**32 - 1, (2, 0), "LT", None),  # the low word runs over: no even growth
    ],
)
def test_trips_of_a_counter_in_two_words(first, last, step, below, times):
    """As TPUs have those of 64 bits."""
    words = {"FIRST": first, "LAST": last, "STEP": step[0], "HIGH": step[1], "BELOW": below}
    text = WORDS
    for name, value in words.items():
        text = text.replace(name, str(value))
    (one,) = hlo.collectives(text, {"x": 4})
    assert (one.times, one.exact) == ((1, False) if times is None else (times, True))


def test_a_number_that_doubles_at_each_step_is_read_once():
    """Each of sixty sums reads the one before twice; the end of the loop is not known."""
    doubled = "\n".join(f"  %d.{i + 1} = s32[] add(%d.{i}, %d.{i})" for i in range(60))
    text = f"""%cond (p: (s32[], s32[])) -> pred[] {{
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %c = pred[] compare(%i, %n), direction=LT
}}
%body (q: (s32[], s32[])) -> (s32[], s32[]) {{
  %q = (s32[], s32[]) parameter(0)
  %d.0 = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=1
{doubled}
  ROOT %t = (s32[], s32[]) tuple(%d.60, %m)
}}
ENTRY %main (n.1: s32[]) -> s32[] {{
  %n.1 = s32[] parameter(0)
  %o = s32[] constant(1)
  %u = (s32[], s32[]) tuple(%o, %n.1)
  %w = (s32[], s32[]) while(%u), condition=%cond, body=%body
  ROOT %r = s32[] get-tuple-element(%w), index=0
}}
"""
    assert [(x.times, x.exact) for x in visits(parse(text))][1] == (1, False)


WRAPPED = """%scatter (i: f32[8,4]) -> f32[2,4] {
  %i = f32[8,4] parameter(0)
  %r = f32[8,4] all-reduce(%i), replica_groups={{0,1,2,3}}, to_apply=%sum
  %z = s32[] constant(0)
  ROOT %d = f32[2,4] dynamic-slice(%r, %z, %z), dynamic_slice_sizes={2,4}
}
%begin (i.1: f32[2,4]) -> (f32[2,4], f32[8,4], u32[]) {
  %i.1 = f32[2,4] parameter(0)
  %g = f32[8,4] all-gather(%i.1), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="7"}
  ROOT %b = (f32[2,4], f32[8,4], u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%beside (i.2: f32[2,4], j.2: f32[8,4]) -> (f32[8,4], f32[8,4]) {
  %i.2 = f32[2,4] parameter(0)
  %j.2 = f32[8,4] parameter(1)
  %g.2 = f32[8,4] all-gather(%i.2), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="7"}
  %k.2 = f32[8,4] tanh(%j.2)
  ROOT %t.2 = (f32[8,4], f32[8,4]) tuple(%g.2, %k.2)
}
%apart (i.3: f32[8,4]) -> f32[8,4] {
  %i.3 = f32[8,4] parameter(0)
  ROOT %a.3 = f32[8,4] all-to-all(%i.3), replica_groups={{0,1},{2,3}}, dimensions={0}
}
ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4] parameter(0)
  %s = f32[2,4] fusion(%x), kind=kCustom, calls=%scatter
  %b.1 = (f32[2,4], f32[8,4], u32[]) fusion(%s), kind=kCustom, calls=%begin
  %f = (f32[8,4], f32[8,4]) fusion(%s, %x), kind=kOutput, calls=%beside
  %y = f32[8,4] get-tuple-element(%f), index=0
  %q = ((f32[8,4]), f32[8,4]) async-start(%y), calls=%apart
  ROOT %w = f32[8,4] async-done(%q)
}
"""


def test_collectives_inside_fusions_count_once():
    """An all-reduce of which a slice is kept, one gather carried on by two fusions, and one begun apart."""
    found = hlo.collectives(WRAPPED, {"a": 2, "b": 2})
    assert [(c.kind, c.payload_bytes, c.axes, c.asynchronous) for c in found] == [
        ("reduce-scatter", 128, ("a", "b"), False),
        ("all-gather", 128, ("a", "b"), True),
        ("all-to-all", 128, ("b",), True),
    ]
    assert [c.wire_bytes for c in found] == [96, 96, 64]


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
