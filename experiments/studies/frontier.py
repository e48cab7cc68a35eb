"""The cost model of the mesh search beside compiled programs, and what it says of large GPTs on Frontier.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m experiments.studies.frontier
                                                     two minutes on a core; writes the JSON
  ... python -m experiments.studies.frontier --check  prints the first part alone, as JSON

First, one step of Adam on a small Transformer is compiled for meshes of eight CPU devices. The bytes of state
on a device, and those that it sends along each axis, are read off the compiled program; beside them stand the
state's share and `frugax.planner.traffic`. Then the model answers what the paper measured, for its machine by
the data sheet: nodes of 8 dies with 64 GB and 191.5 TFLOP/s each, links of 50 GB/s in a node, and 12.5 GB/s
for each die out of it. Products run at full speed in the model, which no die does: its shares of the peak are
bounds, and their order is what counts.

Source: Dash et al. 2023, Optimizing Distributed Training on Frontier for Large Language Models
(arXiv 2312.12705).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import frugax
from experiments.benchmarks.interleaved import about
from frugax.planner import (
    Cluster,
    Configuration,
    Workload,
    device_bytes,
    latency,
    search,
    traffic,
    transformer_workload,
)

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "frontier.json"
LAYERS, WIDTH, HEADS, TIME, BATCH = 4, 64, 8, 32, 16
MESHES = ({"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2})
# Params' axes: layers first, then as they are used.
SHAPES = {
    "qkv": ((LAYERS, WIDTH, 3, HEADS, WIDTH // HEADS), P(None, "fsdp", None, "tensor")),
    "out": ((LAYERS, HEADS, WIDTH // HEADS, WIDTH), P(None, "tensor", None, "fsdp")),
    "up": ((LAYERS, WIDTH, 4 * WIDTH), P(None, "fsdp", "tensor")),
    "down": ((LAYERS, 4 * WIDTH, WIDTH), P(None, "tensor", "fsdp")),
}
DIE_FLOPS, DIE_BYTES, NODE, IN_NODE, BETWEEN = 191.5e12, 64e9, 8, 50e9, 12.5e9
GPTS = {"22B": (48, 6144, 64), "175B": (96, 12288, 1024), "1T": (128, 25600, 3072)}  # layers, width, dies


def small() -> Workload:
    """The costs of the small Transformer in float32."""
    params = 12 * WIDTH**2
    return Workload(
        layers=LAYERS, batch=BATCH, time=TIME, layer_flops=2.0 * params, layer_gradients=4 * params,
        layer_state=16 * params, outer_gradients=0, outer_state=0, stream=4 * WIDTH, kept=0, kept_whole=0,
    )  # fmt: skip


def all_but_placed(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep for the backward pass all but what was only placed, so that params are gathered again."""
    return primitive.name != "sharding_constraint"


def compiled(sizes: dict[str, int]) -> tuple[Any, jax.sharding.Mesh]:
    """One step of Adam on the small Transformer, compiled for a mesh."""
    mesh = frugax.parallel.make_mesh(**({"data": 1} | sizes))
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    places = {name: NamedSharding(mesh, spec) for name, (_, spec) in SHAPES.items()}
    optimizer = optax.scale_by_adam()

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def block(x, p):
        gathered = {}  # a layer's params whole along fsdp for either pass, as ZeRO's third stage has it
        for name, a in p.items():
            whole = P(*(axis if axis == "tensor" else None for axis in SHAPES[name][1][1:]))
            gathered[name] = jax.lax.with_sharding_constraint(a, NamedSharding(mesh, whole))
        q, k, v = jnp.moveaxis(jnp.einsum("btw,wshd->btshd", norm(x), gathered["qkv"]), 2, 0)
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        x = x + jnp.einsum("bthd,hdw->btw", jnp.einsum("bhts,bshd->bthd", weights, v), gathered["out"])
        x = jax.lax.with_sharding_constraint(x, rows)
        x = x + jax.nn.relu(norm(x) @ gathered["up"]) @ gathered["down"]
        return jax.lax.with_sharding_constraint(x, rows), None

    def step(params, state, x):
        def loss(params):
            return jnp.mean(jax.lax.scan(jax.checkpoint(block, policy=all_but_placed), x, params)[0] ** 2)

        grads = jax.grad(loss)(params)
        grads = jax.lax.with_sharding_constraint(grads, places)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: -1e-3 * u, updates)), state

    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=places[name])
        for name, (shape, _) in SHAPES.items()
    }
    state = jax.eval_shape(optimizer.init, params)
    state = state._replace(mu=params, nu=params)
    x = jax.ShapeDtypeStruct((BATCH, TIME, WIDTH), jnp.float32, sharding=rows)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile(), mesh


def compare(sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """Bytes by the model and in the compiled program: of the state, and sent along each axis."""
    program, mesh = compiled(sizes)
    c = Configuration(**sizes, microbatch=BATCH // (sizes.get("data", 1) * sizes.get("fsdp", 1)))
    work, sent = small(), traffic(small(), c)
    rows = BATCH * TIME * WIDTH * 4 // (c.data * c.fsdp)
    found = {
        "state": {
            # Params and two moments, which are arguments; gradients are temporaries.
            "model": 12 / 16 * work.layers * work.layer_state / (c.tensor * c.fsdp),
            "compiled": float(program.memory_analysis().argument_size_in_bytes - rows),
        }
    }
    seen: dict[str, int] = {}
    for one in frugax.planner.collectives(program.as_text(), mesh):
        axis = " x ".join(a for a in one.axes if mesh.shape[a] > 1)
        if axis == "fsdp":
            axis += " params" if one.kind == "all-gather" else " gradients"
        seen[axis] = seen.get(axis, 0) + one.wire_bytes * one.times
    # XLA's CPU compiler adds up for all where a part is wanted, which sends twice as much.
    model = {"data": sent.data, "tensor": sent.tensor, "fsdp params": sent.fsdp_params}
    model["fsdp gradients"] = 2 * sent.fsdp_gradients
    for axis, size in model.items():
        if size:
            found[axis] = {"model": size, "compiled": float(seen.pop(axis, 0))}
    found["other axes"] = {"model": 0.0, "compiled": float(sum(seen.values()))}
    return found


def frontier(dies: int) -> Cluster:
    """Dies of MI250X in nodes of eight."""
    node = np.arange(dies) // NODE
    return Cluster(np.where(node[:, None] == node, IN_NODE, BETWEEN), DIE_FLOPS, DIE_BYTES)


def share_of_peak(work: Workload, c: Configuration, cluster: Cluster) -> float:
    """Time of the products alone over that of a step."""
    ideal = 3 * work.layers * work.batch * work.time * work.layer_flops / DIE_FLOPS / len(cluster.bandwidth)
    return ideal / latency(work, c, cluster).seconds


def rematerialized(work: Workload) -> Workload:
    """The costs where layers keep their inputs alone, and compute the rest again."""
    return work._replace(kept=0, kept_whole=work.stream, layer_flops=4 / 3 * work.layer_flops)


def trends() -> dict[str, dict[str, float]]:
    """Shares of the peak of a 22B model on 64 dies, as one size of the configuration changes."""
    layers, width, dies = GPTS["22B"]
    cluster = frontier(dies)

    def share(batch: int, **sizes: int) -> float:
        work = transformer_workload(layers=layers, width=width, batch=batch, time=2048)
        return round(share_of_peak(work, Configuration(**sizes), cluster), 3)

    return {
        "devices of the tensor axis": {
            str(t): share(256, tensor=t, data=dies // t) for t in (1, 2, 4, 8, 16, 32)
        },
        "microbatches, 8 stages": {str(m): share(m, pipeline=8, tensor=8) for m in (8, 16, 32, 64, 128)},
        "stages, 16 microbatches": {
            str(p): share(16 * (16 // p), pipeline=p, tensor=4, data=16 // p) for p in (2, 4, 8, 16)
        },
        "stages, 8 microbatches a stage": {
            str(p): share(8 * p * (16 // p), pipeline=p, tensor=4, data=16 // p) for p in (2, 4, 8, 16)
        },
    }


def best() -> dict[str, dict[str, Any]]:
    """The best configuration of each model by the search, with its memory and its bound of the peak."""
    found = {}
    for name, (layers, width, dies) in GPTS.items():
        work = transformer_workload(layers=layers, width=width, batch=2 * dies, time=2048, vocab=51200)
        work = rematerialized(work)
        cluster = frontier(dies)
        first = search(work, cluster, steps=0, keep=1)[0]
        c = first.configuration
        assert device_bytes(work, c) == first.bytes <= DIE_BYTES
        found[name] = c._asdict() | {
            "dies": dies,
            "GB": round(first.bytes / 1e9, 1),
            "share_of_peak": round(3 / 4 * share_of_peak(work, c, cluster), 3),  # of products done once
        }
        print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with compiled programs, print, write nothing"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    if args.check:
        print(json.dumps([compare(sizes) for sizes in MESHES]))
        return
    compared = {" x ".join(f"{a}={n}" for a, n in sizes.items()): compare(sizes) for sizes in MESHES}
    for name, terms in compared.items():
        print(name, terms, flush=True)
    found = trends()
    for name, shares in found.items():
        print(name, shares, flush=True)
    result = {"compared": compared, "trends": found, "best": best()}
    args.out.write_text(json.dumps(about() | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
