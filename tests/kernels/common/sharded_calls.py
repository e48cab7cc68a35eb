"""Run by test_sharding.py on eight devices: `per_shard` against the same function unsharded.

    python -m tests.kernels.common.sharded_calls WHAT [AXIS_TYPE]

The kernel is a toy, so that compiling is quick: an opaque copy around the definition. It can't be partitioned
by XLA any more than a real one, and has a real one's signature.
"""

import re
import sys
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from frugax.kernels import linear_attention
from frugax.kernels.common.sharding import AxisNames, per_shard
from frugax.kernels.linear_attention import pallas_tpu, reference
from tests.errors import assert_close

B, T, H, K, V = 4, 5, 8, 3, 2


def _copy(x):
    def body(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


def forward(call, scale, feature_map=None, *, interpret=True):
    return jax.tree.map(_copy, reference.forward(jax.tree.map(_copy, call), scale))


def backward(call, cotangents, scale, feature_map=None, *, interpret=True):
    call, cotangents = jax.tree.map(_copy, (call, cotangents))
    f = lambda floats: reference.forward(floats._replace(runs=call.runs), scale)  # noqa: E731
    return jax.tree.map(_copy, jax.vjp(f, call._replace(runs=None))[1](cotangents)[0])


def arguments(decay="h", q_heads=H, k_heads=H, v_heads=H):
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = {"h": (H,), "bth": (B, T, H), "bthk": (B, T, H, K)}
    args = {
        "q": jax.random.normal(keys[0], (B, T, q_heads, K)),
        "k": jax.random.normal(keys[1], (B, T, k_heads, K)),
        "v": jax.random.normal(keys[2], (B, T, v_heads, V)),
        "log_decay": -jax.random.uniform(keys[3], shapes[decay]),
        "bonus": jax.random.normal(keys[4], (H, K)),
        "initial_state": jax.random.normal(keys[5], (B, H, K, V)),
    }
    return {name: x.astype(jnp.float32) for name, x in args.items()}  # with 64 bits on too


SEGMENTS = jnp.array([[0, 0, 1, 1, 2]] * B)


def loss(backend, args, segment_ids=SEGMENTS):
    out, state = linear_attention(**args, segment_ids=segment_ids, backend=backend)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))


def specs(args, batch, heads):
    named = {"q": (batch, None, heads), "bonus": (heads,), "initial_state": (batch, heads)}
    named |= {"k": named["q"], "v": named["q"]}
    named["log_decay"] = named["bonus"] if args["log_decay"].ndim == 1 else named["q"]
    return {name: P(*named[name]) for name in args}


def place(mesh, args, batch, heads):
    def where(x, spec):  # single heads stay whole
        fits = (
            a if a is None or n % mesh.shape[a] == 0 else None for a, n in zip(spec, x.shape, strict=False)
        )
        return jax.device_put(x, NamedSharding(mesh, P(*fits)))

    placed = specs(args, batch, heads)
    return {name: where(x, placed[name]) for name, x in args.items()}


def meshes(*shape):
    for kind in map(AxisType.__getitem__, sys.argv[2:] or ("Auto", "Explicit")):
        yield jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(kind,) * len(shape))


def both(backend):
    return jax.jit(jax.value_and_grad(partial(loss, backend)))


def check(f, args, wanted):
    assert_close(f(args), wanted, "float32")


def placements():
    """Batch and heads over a 2 x 4 mesh; gradients of decays and bonuses are sums over shards of batch."""
    for case in ({}, {"decay": "bthk", "k_heads": 1}, {"decay": "bth", "k_heads": 2}):
        args = arguments(**case)
        wanted = both("reference")(args)
        for mesh in meshes(2, 4):
            check(both("pallas_tpu"), place(mesh, args, "data", "model"), wanted)


def whole():
    """A mesh that splits nothing."""
    args = arguments()
    for mesh in meshes(2, 4):
        check(both("pallas_tpu"), place(mesh, args, None, None), both("reference")(args))


def transformed():
    """Under scan with remat, and under vmap."""
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arguments())

    def scanned(backend, stacked):
        step = jax.checkpoint(lambda total, args: (total + loss(backend, args), None))
        return jax.lax.scan(step, 0.0, stacked)[0]

    def mapped(backend, stacked):
        return jnp.sum(jax.vmap(partial(loss, backend))(stacked))

    for mesh in meshes(2, 4):
        put = {
            n: jax.device_put(x, NamedSharding(mesh, P(None, *specs(arguments(), "data", "model")[n])))
            for n, x in stacked.items()
        }
        for f in (scanned, mapped):
            check(
                jax.jit(jax.value_and_grad(partial(f, "pallas_tpu"))),
                put,
                jax.value_and_grad(partial(f, "reference"))(stacked),
            )


def manual():
    """Inside a caller's shard_map, over all axes or one, and under pmap."""
    args = arguments()
    wanted = both("reference")(args)
    for backend in ("pallas_tpu", "xla"):
        for mesh, heads, checked in zip(meshes(2, 4), ("model", None), (True, False), strict=True):
            split = specs(args, "data", heads)
            names = {"data", heads} - {None}
            f = jax.shard_map(
                lambda args, ids, names=names, backend=backend: jax.lax.psum(
                    loss(backend, args, ids), tuple(names)
                ),
                mesh=mesh,
                in_specs=(split, P("data")),
                out_specs=P(),
                axis_names=names,
                check_vma=checked,
            )
            ids = jax.device_put(SEGMENTS, NamedSharding(mesh, P("data")))
            put = place(mesh, args, "data", "model" if heads else None)
            check(
                jax.jit(jax.value_and_grad(partial(lambda f, ids, args: f(args, ids), f, ids))), put, wanted
            )
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), args)
    got = jax.pmap(jax.value_and_grad(partial(loss, "pallas_tpu")))(twice)
    assert_close(jax.tree.map(lambda x: x[1], got), wanted, "float32")


def partitioned():
    """By XLA's partitioner, as GPUs have it: it follows the arguments and moves no tokens."""

    @partial(jax.custom_vjp)
    def call(x):
        names, results = axes(x)
        return per_shard(partial(forward, scale=1.0), AxisNames((names,), results))(x)

    def axes(x):
        decay = {1: "h", 3: "b t h", 4: "b t h k"}[x.log_decay.ndim]
        return type(x)("b t h k", "b t h k", "b t h v", decay, "h k", "b h k v", None), ("b t h v", "b h k v")

    def bwd(x, cotangents):
        names, results = axes(x)
        return (per_shard(partial(backward, scale=1.0), AxisNames((names, results), names))(x, cotangents),)

    call.defvjp(lambda x: (call(x), x), bwd)

    def total(f, args):
        out, state = f(reference.Inputs(**args, runs=None))
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

    cases = ({}, {"k_heads": 1, "decay": "bth"}, {"k_heads": 2, "q_heads": 2, "decay": "bthk"})
    mesh = next(meshes(2, 4))
    for case in cases:
        args = arguments(**case)
        wanted = jax.value_and_grad(partial(total, partial(reference.forward, scale=1.0)))(args)
        put = place(mesh, args, "data", "model")
        f = jax.jit(jax.value_and_grad(partial(total, call)))
        check(f, put, wanted)
        text = f.lower(put).compile().as_text()
        moved = re.findall(r"f32\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute)\(", text)
        sizes = [int(np.prod([int(n) for n in dims.split(",")])) for dims, _ in moved if dims]
        few = B // 2 * T * case.get("k_heads", 0) * K  # heads that don't divide the axis are gathered
        assert all(size <= few for size in sizes), (case, moved)
        stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), args)
        over = lambda f: jax.value_and_grad(lambda s: jnp.sum(jax.vmap(partial(total, f))(s)))  # noqa: E731
        put = {n: jax.device_put(x, NamedSharding(mesh, P("data"))) for n, x in stacked.items()}
        if not case:
            check(jax.jit(over(call)), put, over(partial(reference.forward, scale=1.0))(stacked))


def quiet():
    """XLA's own partitioning moves no tokens: only gradients of parameters are summed."""
    args = arguments("bthk")
    for mesh in meshes(2, 4):
        text = both("xla").lower(place(mesh, args, "data", "model")).compile().as_text()
        assert not re.search(r"(all-gather|all-to-all|collective-permute)(-start)?\(", text)
        sums = re.findall(r"(\S+) all-reduce\(", text)
        assert all(
            np.prod([int(n) for n in re.findall(r"\d+", s.split("[")[1].split("]")[0])] or [1]) <= H * K
            for s in sums
            if "[" in s
        ), sums


if __name__ == "__main__":
    toy = {"unsupported_reason": lambda call, **_: None, "forward": forward, "backward": backward}
    with mock.patch.multiple(pallas_tpu, **toy):
        globals()[sys.argv[1]]()
