"""Plan a config's training step for devices that are not here: memory, collectives, time, MFU.

  python -m experiments.plan --config=experiments/configs/pods/gla_1p3b.py --topology=v5e:16x16
  python -m experiments.plan --config=FILE --topology=v5p:8x8x8 --config.mesh.tensor=4    fields as for train
  python -m experiments.plan --config=FILE --topology=v5p:2x2x2 --search                  finds the mesh

The real step is compiled for the topology by the chip's own compiler; no data is read, no state is made, and
nothing runs. A table is printed; plan.json and memory.png (bytes of a device over the schedule) go to --out.
Topologies: v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, h100:8, cpu:8; v5p:8x8x8*2 is two slices.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from experiments.configs.checks import check_config
from experiments.data import load_tokenizer
from experiments.trainer.flags import CONFIG, run, run_dir
from experiments.trainer.optimizers import check_optimizer, make_optimizer
from experiments.trainer.parallel import Layout, make_layout
from experiments.trainer.runs import build_model, build_step, shapes_of
from experiments.trainer.state import init_state
from frugax.parallel import AXES
from frugax.planner import Cluster, Plan, Topology, Workload, flops, plan, search, topology
from frugax.planner.plan import shard_bytes
from frugax.planner.timeline import PHASES

TOPOLOGY = flags.DEFINE_string("topology", None, "Devices to plan for, such as v5e:16x16.")
OUT = flags.DEFINE_string("out", None, "Folder of plan.json and memory.png; by default plan/ in the run's.")
SEARCH = flags.DEFINE_bool("search", False, "Find the sizes of mesh.data, mesh.fsdp and mesh.tensor.")
CANDIDATES = 3  # of a search: compiled, best of the model first


class Progress:
    """Lines that say what is done, with the seconds it took."""

    def __init__(self):
        self.since = time.monotonic()

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        print(f"[{now - self.since:6.1f} s] {text}", flush=True)
        self.since = now


def plan_config(config: ConfigDict, system: Topology, say: Any = lambda text: None) -> Plan:
    """Compile a config's training step for a topology and read its plan.

    Args:
      config: of a run, checked.
      system: `frugax.planner.topology`.
      say: told what is done.

    Raises:
      ValueError: the config can't be right, its mesh does not fit the devices, or the program their memory.
    """
    if config.parallel != "jit":
        raise ValueError(f"parallel: got {config.parallel!r}; expected 'jit' to plan for")
    config = _with_vocabulary(config)
    _check_mesh(config, system)
    layout = make_layout(config, system.devices)
    module = build_model(config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    check_optimizer(config.optimizer, optimizer, shapes_of(module, config))
    rounding = config.optimizer.rounding
    state = layout.abstract(
        lambda: init_state(module, optimizer, config.seed, config.ema_decay, rounding=rounding)
    )
    batch = layout.abstract_batch(_batch_shapes(config))
    mesh = batch["tokens"].sharding.mesh
    step = build_step(config, module, optimizer, layout)
    say(f"built {config.model.repeats * len(config.model.pattern)} layers over {layout.devices} devices")
    with jax.set_mesh(mesh):
        executed = flops(step, state, batch)
        forward = flops(lambda p, b: _forward(module, state, p, b), state.params, batch)
        gradients = _gradient_places(layout, state, mesh)
    say("traced, operations counted")
    try:
        compiled, text = _compiled(layout, step, state, batch, dumps=system.platform == "tpu")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        said = " ".join(str(error).splitlines()[:2])[:300]
        raise ValueError(
            f"topology: got {system.name}; expected devices that hold the step: {said}"
        ) from error
    say("compiled")
    made = plan(
        compiled,
        topology=system,
        mesh=mesh,
        arguments={
            "params": state.params,
            "optimizer": state.optimizer,
            "batch": batch,
            "other state": state._replace(params=None, optimizer=None),
        },
        gradients=gradients,
        executed=executed,
        model_flops=3 * forward.total,  # a backward pass does twice the forward's products
        text=text,
    )
    say("read")
    return made


def _check_mesh(config: ConfigDict, system: Topology) -> None:
    """Raise ValueError unless the mesh has all the devices: a part of a TPU's slice is no slice."""
    sizes = {name: config.mesh[name] for name in AXES}
    given, devices = math.prod(n for n in sizes.values() if n != -1), len(system.devices)
    if devices % given or (-1 not in sizes.values() and given != devices):
        said = ", ".join(f"{name}={n}" for name, n in sizes.items() if n != 1) or "sizes of 1"
        raise ValueError(
            f"mesh: got {said}, {given} devices; expected sizes that multiply to the {devices} of "
            f"{system.name}"
        )


def _compiled(layout: Layout, step: Any, state: Any, batch: Any, *, dumps: bool) -> tuple[Any, str]:
    """The compiled step, and the text that the compiler dumps of it, which `as_text()` may not print."""
    if not dumps:
        return layout.compile(step, state, batch), ""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = layout.compile(step, state, batch, options)
        found = sorted(Path(folder).glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
        return compiled, found[-1].read_text() if found else ""


def _with_vocabulary(config: ConfigDict) -> ConfigDict:
    """A copy, its vocabulary the tokenizer's if it says none."""
    config = config.copy_and_resolve_references()
    if not config.model.vocab_size:
        config.model.vocab_size = load_tokenizer(config.data.tokenizer or None).vocab_size
    return config


def _batch_shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what `experiments.data.make_loader` yields."""
    rows, time_ = config.batch_size, config.data.sequence_length
    whole = {name: jnp.int32 for name in ("tokens", "targets", "segment_ids")} | {"weights": jnp.float32}
    shapes = {name: jax.ShapeDtypeStruct((rows, time_), dtype) for name, dtype in whole.items()}
    return shapes | {"bytes": jax.ShapeDtypeStruct((rows,), jnp.int32)}


def _forward(module: Any, state: Any, params: Any, batch: Any) -> Any:
    rngs = {name: jax.random.key(0) for name in ("dropout", "low_bit", "router")}
    variables = {"params": params, **state.collections}
    mutable = ["moe", *state.collections]
    return module.apply(
        variables, batch["tokens"], segment_ids=batch["segment_ids"], rngs=rngs, mutable=mutable
    )


def _gradient_places(layout: Layout, state: Any, mesh: Any) -> Any:
    """Gradients in float32 where the step has them."""
    zero = layout.place_grads
    wide = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32)), state.params
    )
    placed = jax.jit(zero).trace(wide).jaxpr
    places = iter(e.params["sharding"] for e in placed.eqns if e.primitive.name == "sharding_constraint")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=next(places)), wide)


def best_mesh(config: ConfigDict, system: Topology, say: Any) -> tuple[ConfigDict, Plan]:
    """Find sizes of mesh.data, mesh.fsdp and mesh.tensor: a model ranks them, then the best few are compiled.

    The config's other axes stay. In the model an axis of experts is a part of fsdp.

    Raises:
      ValueError: the model finds none that fits, or none of the best compiles.
    """
    given = {name: max(config.mesh[name], 1) for name in ("pipeline", "sequence", "expert")}
    cluster, work = _cluster(system, given["pipeline"]), _workload(config)
    expert = given.pop("expert")
    # Places are those that the mesh gives devices, and links within a slice are equal: nothing to anneal.
    found = search(work, cluster, axes=("data", "fsdp", "tensor"), given=given, steps=0, keep=1000)
    shapes = list(dict.fromkeys(f.configuration.axes for f in found))  # whatever the microbatch
    shapes = [x for x in shapes if x[1] % system.slices == 0 and x[2] % expert == 0]
    say(f"{len(shapes)} meshes fit by the model of them")
    made: list[tuple[ConfigDict, Plan]] = []
    for _, data, fsdp, _, tensor in shapes:
        if len(made) == CANDIDATES:
            break
        tried = config.copy_and_resolve_references()
        sizes = {"slice": system.slices, "data": data // system.slices, "fsdp": fsdp // expert}
        tried.mesh.update(sizes | {"tensor": tensor} | given | {"expert": expert})
        name = " ".join(f"{axis}={tried.mesh[axis]}" for axis in AXES if tried.mesh[axis] > 1) or "one device"
        try:
            made.append((tried, plan_config(tried, system)))
        except (ValueError, NotImplementedError) as error:
            say(f"{name}: {error}")
            continue
        if made[-1][1].times is None:
            say(f"{name}: {made.pop()[1].unread}")
            continue
        seconds = made[-1][1].times.step * 1e3
        say(f"{name}: {seconds:.2f} ms, MFU {made[-1][1].mfu:.1%}, {made[-1][1].total / 2**30:.2f} GiB")
    if not made:
        raise ValueError(f"topology: got {system.name}; expected one that some mesh of the config fits")
    roomy = [both for both in made if both[1].fits()] or made
    return min(roomy, key=lambda both: both[1].times.step)


def _cluster(system: Topology, stages: int) -> Cluster:
    """The links of a mesh: a slice has whole pipelines, so messages are fast, and sums of gradients slow.

    In a mesh slices lie outside stages (`frugax.parallel.AXES`), in a `Configuration` inside, as copies.
    """
    if system.chip is None:
        raise ValueError(
            f"topology: got {system.name}; expected TPUs or GPUs to search for, CPUs have no times"
        )
    per_slice = len(system.devices) // system.slices
    if per_slice % stages:
        raise ValueError(f"mesh.pipeline: got {stages}; expected a divisor of a slice's {per_slice} devices")
    slices = np.tile(np.repeat(np.arange(system.slices), per_slice // stages), stages)
    near = slices[:, None] == slices
    bandwidth = np.where(near, 2 * system.chip.link, system.chip.network).astype(float)
    return Cluster(bandwidth, flops=system.chip.peak, memory=0.9 * system.chip.memory)


def _workload(config: ConfigDict) -> Workload:
    """The model of a config for the search, from shapes of its params and products of a forward pass."""
    config = _with_vocabulary(config)
    module, model = build_model(config), config.model
    layers, length = model.repeats * len(model.pattern), config.data.sequence_length
    row = {
        name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in _batch_shapes(config).items()
    }
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = jax.eval_shape(lambda: init_state(module, optimizer, 0, config.ema_decay))
    count = flops(lambda p, b: _forward(module, state, p, b), state.params, row).total
    inside = {k: v for k, v in state.params.items() if k.startswith("layers")}
    params = sum(x.size for x in jax.tree.leaves(state.params))
    of_layers = sum(x.size for x in jax.tree.leaves(inside)) // layers
    outer = params - of_layers * layers
    of_state = shard_bytes(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.params, state.optimizer))
    )
    itemsize = jnp.dtype(model.dtype).itemsize
    head = 2 * model.vocab_size * model.width
    stream = itemsize * model.width
    return Workload(
        layers=layers,
        batch=config.batch_size,
        time=length,
        layer_flops=(count / length - head) / layers,
        layer_gradients=4 * of_layers,
        layer_state=int(of_layers * (of_state / params + 4)),
        outer_gradients=4 * outer,
        outer_state=int(outer * (of_state / params + 4)),
        stream=stream,
        kept=0 if model.remat else 12 * stream,
        kept_whole=stream if model.remat else 4 * stream,
    )


def draw(
    points: list[Any], constant: Mapping[str, int], path: str | Path, *, memory: int | None, title: str
) -> None:
    """Draw the bytes of a device over the schedule, stacked by kind, with the peak marked.

    Args:
      points: of a `Plan`.
      constant: bytes that are there all the time, by kind, such as {"params": ...}.
      path: of the picture.
      memory: bytes that the device has, a line in the picture if half of them are used; None draws none.
      title: above it.
    """
    gib = 2**30
    peak = max(points, key=lambda p: p.total)
    height = peak.total + sum(constant.values())
    seen = {name: size for name, size in constant.items() if size >= 0.01 * height}
    seen["other arguments and results"] = sum(constant.values()) - sum(seen.values())
    rows = {name: [size / gib] * len(points) for name, size in seen.items() if size}
    rows |= {f"temporaries: {name}": [p.bytes[name] / gib for p in points] for name in PHASES}
    figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(range(len(points)), *rows.values(), labels=rows.keys(), step="post", linewidth=0)
    at = points.index(peak)
    axes.plot([at], [height / gib], "kv")
    words = f"{height / gib:.3g} GiB at {peak.name}"
    side = ("left", "center", "right")[3 * at // len(points)]  # so that the words stay within the picture
    axes.annotate(words, (at, height / gib), (0, 7), textcoords="offset points", ha=side)
    axes.set_ylim(0, 1.15 * height / gib)
    if memory and memory < 2 * height:
        axes.axhline(memory / gib, color="k", linestyle="--", linewidth=1, label="the device's memory")
        axes.set_ylim(0, 1.1 * max(1.05 * height, memory) / gib)
    axes.set(xlabel="instructions in order, one trip of each loop", ylabel="GiB a device", title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=110)


def write(made: Plan, out: Path) -> None:
    """Write plan.json and, where the schedule could be read, memory.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(made.as_dict(), indent=2) + "\n")
    if not made.points:
        return
    constant = {k: n for k, n in made.bytes.items() if k not in ("gradients", "activations") and n}
    has = f", which has {made.memory / 2**30:.0f} GiB" if made.memory else ""
    title = f"A device of {made.topology}{has}"
    draw(made.points, constant, out / "memory.png", memory=made.memory, title=title)


def main(argv: list[str]) -> None:
    """Parse flags, plan, print and write."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; fields of the config are given as --config.a.b=value")
    if CONFIG.value is None or TOPOLOGY.value is None:
        missing = "--config" if CONFIG.value is None else "--topology"
        raise app.UsageError(f"{missing} is missing; expected --config=FILE --topology=v5e:16x16")
    config = CONFIG.value
    try:
        check_config(config)
        if TOPOLOGY.value.startswith("cpu:") and TOPOLOGY.value[4:].isdigit():
            with contextlib.suppress(RuntimeError):  # it has devices; `topology` says if too few
                jax.config.update("jax_num_cpu_devices", int(TOPOLOGY.value[4:]))
        system = topology(TOPOLOGY.value)
        say = Progress()
        if SEARCH.value:
            config, made = best_mesh(config, system, say)
        else:
            made = plan_config(config, system, say)
        out = Path(OUT.value or Path(run_dir()) / "plan")
        print(f"\n{made.table()}\n")
        write(made, out)
        print(f"written to {out}")
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.plan: {error}")


if __name__ == "__main__":
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # nothing runs, so no accelerator is taken
    run(main)
