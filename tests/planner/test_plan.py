"""Plans: bytes are the compiler's, operations are counted by hand, times follow from the model's rules."""

import importlib.util
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app
from absl.testing import flagsaver
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import experiments.plan
import frugax
from experiments.configs.lm import quickstart
from experiments.plan import plan_config, write
from experiments.trainer.flags import parse
from frugax import planner
from frugax.kernels.common.chips import DEVICES
from frugax.planner import program, timeline, timing
from tests.devices import run_on_eight_devices


def test_operations_of_a_decoder_are_those_of_a_hand_formula():
    """Each row meets each matrix of the mixers, of the GLUs and of the head once; twice more backward."""
    width, vocab, rows, time, layers = 32, 48, 2, 20, 3
    block = frugax.layers.Block(mixer="GatedLinearAttention", channel="GLU")
    model = frugax.layers.Decoder(vocab_size=vocab, width=width, blocks=(block,), repeats=layers, remat=True)
    tokens = jax.ShapeDtypeStruct((rows, time), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    forward = lambda v, t: model.apply(v, t)[0].sum()  # noqa: E731
    matrices = sum(
        math.prod(x.shape) for path, x in jax.tree.leaves_with_path(variables) if "kernel" in str(path[-1])
    )
    by_hand = 2 * rows * time * (matrices + vocab * width)
    count = planner.flops(forward, variables, tokens)
    assert (count.total - count.kernels, count.exact) == (by_hand, True)
    # Twice the products backward; `remat` does the layers' again, but for those that no gradient asks for.
    both = planner.flops(jax.grad(forward), variables, tokens)
    of_layers = 2 * rows * time * matrices
    assert 3 * by_hand <= both.total - both.kernels <= 3 * by_hand + of_layers


def test_loops_branches_and_shards_are_counted():
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    once = 2 * 4**3
    loop = lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 3, lambda y: y @ y, x)  # noqa: E731
    assert planner.flops(loop, x) == (once, 0, False)
    branch = lambda x: jax.lax.cond(x[0, 0] < 3, lambda y: y @ y @ y, lambda y: y @ y, x)  # noqa: E731
    assert planner.flops(branch, x) == (2 * once, 0, False)
    mesh = frugax.parallel.make_mesh(data=-1, devices=jax.devices()[:1])
    shard = jax.shard_map(lambda y: y @ y, mesh=mesh, in_specs=P(), out_specs=P())
    assert planner.flops(shard, x) == (once, 0, True)
    conv = lambda a, b: jax.lax.conv_general_dilated(a, b, (1,), "SAME", feature_group_count=2)  # noqa: E731
    a, b = jax.ShapeDtypeStruct((3, 6, 10), jnp.float32), jax.ShapeDtypeStruct((4, 3, 5), jnp.float32)
    assert planner.flops(conv, a, b).total == 2 * (3 * 4 * 10) * (3 * 5)
    w, rows = jax.ShapeDtypeStruct((2, 16, 32), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
    grouped = lambda w, x: frugax.kernels.grouped_matmul(x, w, jnp.array([3, 5])).sum()  # noqa: E731
    assert planner.flops(jax.grad(grouped, (0, 1)), w, rows).total == 3 * 2 * 8 * 16 * 32


HEAD = """ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
"""
TPU = (
    HEAD
    + """  %b = f32[8,128]{1,0} add(%a, %a), backend_config={"window_config":{"estimated_cycles":"1500"}}
  %s = (f32[8,128], f32[16,128]) all-gather-start(%b), replica_groups=[2,2]<=[4], dimensions={0}
  %c = f32[8,128]{1,0:T(8,128)} tanh(%b), backend_config={"window_config":{"estimated_cycles":"15"}}
  %d = f32[16,128]{1,0:T(8,128)} all-gather-done(%s)
  %e = f32[8,128]{1,0:T(8,128)} all-reduce(%c), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%sum
  ROOT %f = f32[8,128]{1,0:T(8,128)} custom-call(%e, %d), custom_call_target="tpu_custom_call"
}"""
)


@pytest.mark.deviceless
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_times_follow_from_cycles_links_and_bytes():
    system = planner.topology("v5e:2x2")
    assert (len(system.devices), system.chip.peak) == (4, 197e12)
    mesh = frugax.parallel.make_mesh(data=2, fsdp=2, devices=system.devices)
    link = 50e9  # a line of two has one
    assert [system.sending(mesh, axes) for axes in (("fsdp",), ("data", "fsdp"))] == [link, 2 * link]
    found = timing.times(program.parse(TPU), mesh, system, planner.Flops(4 * 197e6, 4 * 197e6, True))
    gather, beside = 8 * 128 * 4 / link, 15 / 1.5e9
    reduce = 8 * 128 * 4 / system.sending(mesh, ("data",))  # 2 * (2 - 1) / 2 of its bytes
    assert found.compiler == pytest.approx(1515 / 1.5e9)
    assert found.exposed == pytest.approx(gather - beside + reduce)
    assert found.hidden == pytest.approx(beside)
    assert found.kernels == pytest.approx(
        1e-6
    )  # a millionth of a second at the peak, more than its bytes take
    assert found.step == found.compiler + found.roofline + found.kernels + found.exposed


def test_what_each_device_sends_itself_is_no_message():
    """The compiler leaves such a permutation in a program where an axis has one device."""
    permute = "  ROOT %b = f32[8,128]{1,0} collective-permute(%a), source_target_pairs={{0,0}}\n}"
    mesh = frugax.parallel.make_mesh(devices=jax.devices()[:1])
    assert planner.collectives(HEAD + permute, mesh) == []


def test_memory_over_the_schedule_is_that_of_its_buffers():
    text = (
        HEAD
        + """  %b = f32[8,128]{1,0:T(8,128)} tanh(%a), metadata={op_name="jit(f)/jvp(g)/tanh"}
  %v = f32[8,128]{1,0:T(8,128)S(1)} copy(%b)
  %c = f32[9,100]{1,0:T(8,128)} slice(%v), metadata={op_name="jit(f)/transpose(jvp(g))/slice"}
  %t = (f32[8,128], f32[9,100]) tuple(%b, %c)
  %g = f32[9,100]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %d = f32[9,100]{1,0:T(8,128)} sine(%g)
  ROOT %e = f32[8,128]{1,0:T(8,128)} custom-call(%d)
}"""
    )
    points = timeline.timeline(program.parse(text))
    tile = 8 * 128 * 4
    forward, backward = [p.bytes["forward"] for p in points], [p.bytes["backward"] for p in points]
    assert [p.name for p in points] == ["b", "c", "d"]
    assert forward == [tile, 0, 0]  # read for the last time by the copy into VMEM
    assert backward == [0, 2 * tile, 2 * tile]  # nine rows are two tiles, and the sine is put in its place


def compiled_step(mesh):
    """A step of a scan of layers with its state donated, and its arguments."""

    def step(params, moments, x):
        loss = lambda p: jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0] ** 2)  # noqa: E731
        grads = jax.grad(loss)(params)
        moments = 0.9 * moments + grads
        return params - moments, moments

    place = lambda shape, *spec: jax.ShapeDtypeStruct(  # noqa: E731
        shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec))
    )
    params, x = place((3, 256, 256), None, "fsdp"), place((64, 256), "fsdp")
    out = params.sharding, params.sharding
    lowered = jax.jit(step, donate_argnums=(0, 1), out_shardings=out).lower(params, params, x)
    return (
        lowered,
        {"params": params, "optimizer": params, "batch": x},
        planner.flops(step, params, params, x),
    )


@pytest.mark.nan
@pytest.mark.parametrize(
    "name",
    [
        "cpu:1",
        pytest.param("v5e:2x2", marks=pytest.mark.deviceless),
        pytest.param("h100:8", marks=[pytest.mark.deviceless, pytest.mark.full]),
        pytest.param("v5p:2x2x1*2", marks=[pytest.mark.deviceless, pytest.mark.full]),
    ],
)
def test_bytes_are_the_compilers(name):
    needs = {"c": "jax", "v": "libtpu", "h": "jax_cuda13_plugin"}[name[0]]
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    system = planner.topology(name)
    mesh = frugax.parallel.make_mesh(slice=system.slices, data=1, fsdp=-1, devices=system.devices)
    lowered, arguments, count = compiled_step(mesh)
    n = len(system.devices) // system.slices
    compiled = lowered.compile()
    made = planner.plan(
        compiled,
        topology=system,
        mesh=mesh,
        arguments=arguments,
        gradients=arguments["params"],
        executed=count,
        model_flops=3 * 3 * 2 * 64 * 256 * 256,
    )
    said = compiled.memory_analysis()
    kept = said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    assert made.total == kept + said.temp_size_in_bytes
    assert made.bytes["params"] == made.bytes["optimizer"] == 3 * 256 * 256 * 4 // n
    assert made.bytes["batch"] == 64 * 256 * 4 // n
    assert made.exact
    assert set(made.as_dict()) >= {"mfu", "seconds", "bytes_per_device", "total_bytes"}
    assert f"{made.devices} devices" in made.table()
    peak = max(p.total for p in made.points)
    # What the compiler puts beside the lives of buffers is more in so small a program; CPUs add nothing.
    factor = 1.2 if name == "cpu:1" else 2
    assert said.temp_size_in_bytes / factor - 4096 <= peak <= factor * said.temp_size_in_bytes + 4096
    if name == "cpu:1":
        assert made.times is made.mfu is made.memory is made.fits() is None
        assert made.collectives == {}
        return
    assert made.fits()
    assert all(axes in (("fsdp",), ("slice",), ("slice", "fsdp")) for axes, _ in made.collectives)
    assert sum(made.collectives.values()) > 0
    seconds = made.times.step
    assert made.mfu == pytest.approx(made.model_flops / (len(system.devices) * system.chip.peak * seconds))
    assert 0 < made.mfu < 1


def test_a_text_that_cannot_be_had_is_told():
    """libtpu may write instructions that jaxlib does not know; bytes and operations are told all the same."""
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()

    class Unreadable:
        memory_analysis = compiled.memory_analysis

        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update")

    system = planner.topology("cpu:1")
    mesh = frugax.parallel.make_mesh(devices=system.devices)
    made = planner.plan(Unreadable(), topology=system, mesh=mesh, arguments={"a": x})
    assert made.total == 64
    assert (made.collectives, made.times, made.points) == ({}, None, [])
    assert "The compiled text can't be read: INTERNAL: RET_CHECK failure: async-update" in made.table()
    assert "MB a device sends" not in made.table()


def test_wrong_calls_are_named():
    for name in ("v5e", "v9:2x2", "v5e:0x2", "h100:8*0"):
        with pytest.raises(
            ValueError, match=rf"topology: got '{name.replace('*', '.')}'; expected such as v5e:16x16"
        ):
            planner.topology(name)
    with pytest.raises(ValueError, match="topology: got 'cpu:99'; expected at most"):
        planner.topology("cpu:99")
    system = planner.topology("cpu:1")
    mesh = frugax.parallel.make_mesh(devices=system.devices)
    with pytest.raises(ValueError, match="topology: got cpu:1; expected chips of v5e, v5p"):
        system.sending(mesh, ("data",))
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    step = jax.jit(lambda x: x + 1).lower(x)
    with pytest.raises(
        ValueError, match="arguments: got 64 bytes a device; expected at most the program's 32"
    ):
        planner.plan(step, topology=system, mesh=mesh, arguments={"a": x, "b": x})


@pytest.mark.deviceless
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_slices_that_libtpu_refuses_are_told_with_its_reason():
    with pytest.raises(
        ValueError, match=r"topology: got 'v5e:3x5'; expected a slice that libtpu knows.*not divisible"
    ):
        planner.topology("v5e:3x5")


def test_configs_that_do_not_fit_the_devices_are_named():
    system = planner.topology("cpu:1")
    config = quickstart.get_config("smoke")
    for data, fsdp, n in ((1, 2, 2), (-1, 2, 2)):
        config.mesh.data, config.mesh.fsdp = data, fsdp
        with pytest.raises(ValueError, match=f"fsdp={fsdp}, {n} devices; expected .* the 1 of cpu:1"):
            plan_config(config, system)
    config.parallel = "pmap"
    with pytest.raises(ValueError, match="parallel: got 'pmap'; expected 'jit' to plan for"):
        plan_config(config, system)


@pytest.mark.full
def test_a_config_is_planned_and_written(tmp_path):
    config = quickstart.get_config("smoke")
    said = []
    made = plan_config(config, planner.topology("cpu:1"), said.append)
    assert said[1:] == ["traced, operations counted", "compiled", "read"]
    params = made.bytes["params"]
    assert made.bytes["gradients"] == params  # both in float32
    assert (
        params <= made.bytes["optimizer"] <= 2 * params + 1024
    )  # Muon's one moment of matrices, two of others
    assert made.executed_flops > made.model_flops / 2 > 0
    write(made, tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["total_bytes"] == made.total
    assert (tmp_path / "memory.png").stat().st_size > 10_000


@pytest.mark.full
def test_a_config_is_planned_over_eight_devices():
    run_on_eight_devices("tests.planner.plan_calls")


@pytest.mark.full
@pytest.mark.deviceless
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_command_finds_a_mesh(capsys, monkeypatch, tmp_path):
    """A search over v5e:2x2 ranks meshes by a model, compiles the best, prints and writes it."""
    monkeypatch.setattr(experiments.plan, "CANDIDATES", 1)
    config = "--config=experiments/configs/lm/quickstart.py:smoke"
    flags = ["--topology=v5e:2x2", "--search", "--config.batch_size=8", f"--out={tmp_path}"]
    with flagsaver.flagsaver(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ml_collections loads configs in a way that Python deprecates
        left = parse(["plan", config, *flags])
        experiments.plan.main(left)
    printed = capsys.readouterr().out
    made = json.loads((tmp_path / "plan.json").read_text())
    assert math.prod(made["mesh"].values()) == 4
    assert "meshes fit by the model of them" in printed
    assert f"predicted MFU {made['mfu']:.1%}" in printed


def test_a_search_leaves_the_other_axes_as_they_are(monkeypatch):
    """Every mesh that it compiles has all the devices, and the config's own experts and parts of time."""
    tried = []

    def refuse(config, system):
        tried.append(dict(config.mesh))
        raise ValueError("refused")

    monkeypatch.setattr(experiments.plan, "plan_config", refuse)
    config = quickstart.get_config("smoke")
    config.mesh.expert, config.mesh.sequence, config.batch_size = 2, 4, 16
    chips = planner.Topology("fake:16x2", "tpu", DEVICES["v5e"], 2, tuple(range(32)))
    with pytest.raises(ValueError, match="topology: got fake:16x2; expected one that some mesh"):
        experiments.plan.best_mesh(config, chips, lambda text: None)
    assert {(mesh["data"], mesh["fsdp"], mesh["tensor"]) for mesh in tried} == {
        (1, 2, 1),
        (2, 1, 1),
        (1, 1, 2),
    }
    assert all((mesh["slice"], mesh["expert"], mesh["sequence"]) == (2, 2, 4) for mesh in tried)


def test_a_search_knows_which_links_a_pipeline_has():
    """Links are fast within a slice, wherever a mesh with slices outermost puts its devices."""
    system = planner.Topology("fake:8x2", "tpu", DEVICES["v5e"], 2, tuple(range(16)))
    sizes = {"slice": 2, "pipeline": 2, "data": 2, "fsdp": 2}
    slice_of = np.broadcast_to(
        np.arange(2)[:, None, None, None], tuple(sizes.values())
    )  # by place, as in AXES
    of_model = slice_of.swapaxes(0, 1).ravel()  # its axes: pipeline, then data over slices and in them, fsdp
    cluster = experiments.plan._cluster(system, sizes["pipeline"])
    assert ((cluster.bandwidth == 2 * system.chip.link) == (of_model[:, None] == of_model)).all()

    # So messages between stages meet no slow link, and gradients do.
    work = planner.transformer_workload(layers=4, width=256, batch=16, time=128)
    c = planner.Configuration(pipeline=2, data=4, fsdp=2, microbatch=1)
    found, sent = planner.latency(work, c, cluster), planner.traffic(work, c)
    assert found.gradients >= sent.data / system.chip.network
    assert found.messages < sent.pipeline / system.chip.network / 10
    with pytest.raises(ValueError, match=r"mesh\.pipeline: got 3; expected a divisor of a slice's 8 devices"):
        experiments.plan._cluster(system, 3)


def test_the_command_says_what_is_wrong():
    config = "--config=experiments/configs/lm/quickstart.py:smoke"
    for flags, said in (
        (
            [config, "--topology=v9:2x2"],
            "experiments.plan: topology: got 'v9:2x2'; expected such as v5e:16x16",
        ),
        ([config], "--topology is missing"),
        (
            [config, "--topology=cpu:1", "--search"],
            "topology: got cpu:1; expected TPUs or GPUs to search for",
        ),
    ):
        with flagsaver.flagsaver(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            left = parse(["plan", *flags])
            with pytest.raises((SystemExit, app.UsageError), match=said):
                experiments.plan.main(left)


LOOP_ARRAYS = """
HloModule step, is_scheduled=true

%fused_write (a: f32[24,8], b: f32[1,8], i: s32[]) -> f32[24,8] {
  %a = f32[24,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %write = f32[24,8]{1,0} dynamic-update-slice(%a, %b, %i, %zero)
}

%fused_read (c: f32[24,8], j: s32[]) -> f32[1,8] {
  %c = f32[24,8]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %none = s32[] constant(0)
  %slice = f32[1,8]{1,0} dynamic-slice(%c, %j, %none), dynamic_slice_sizes={1,8}
  ROOT %twice = f32[1,8]{1,0} add(%slice, %slice)
}

ENTRY %main (x: f32[24,8], y: f32[1,8], k: s32[]) -> f32[1,8] {
  %x = f32[24,8]{1,0} parameter(0)
  %y = f32[1,8]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %written = f32[24,8]{1,0} fusion(%x, %y, %k), kind=kLoop, calls=%fused_write
  ROOT %read = f32[1,8]{1,0} fusion(%written, %k), kind=kLoop, calls=%fused_read
}
"""


def test_of_an_array_in_slices_the_slices_count():
    """A row of 32 bytes is read and written, or read and its double written; the indices have 4 bytes."""
    parsed = program.parse(LOOP_ARRAYS)
    main = parsed.computations[parsed.entry]
    found = {name: timing._bytes(parsed, main, main.instructions[name]) for name in ("written", "read")}
    assert found == {"written": 32 + 32 + 4, "read": 32 + 32 + 4}
