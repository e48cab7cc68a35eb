"""Run by test_distributed.py on eight devices: DistZO2's forms and one byte a gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from frugax.formats import dynamic8
from frugax.optim import zeroth_order as zo
from tests.errors import assert_close


def setup():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(0.3 * rng.standard_normal((16, 8)), jnp.float32), "b": jnp.zeros(8)}
    x = jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)

    def loss(p, x):
        return jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) - 0.5) ** 2)

    return params, x, loss


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def replicated(tree, mesh):
    """As a step returns it, so that one program serves the first step too."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def replicas_agree(tree):
    for x in jax.tree.leaves(tree):
        shards = [np.asarray(s.data) for s in x.addressable_shards]
        assert len(shards) == 8
        for s in shards[1:]:
            np.testing.assert_array_equal(s, shards[0])


def exchanged(text):
    """The type of each array that a program sends between devices."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute"
    results = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text)
    return [x for result in results for x in re.findall(r"\w+\[[\d,]*\]", result)]


def distzo2():
    params, x, loss = setup()
    estimator = zo.two_point(1e-2, in_place=False)
    single = jax.jit(
        lambda p, key: zo.zo_step(lambda p: loss(p, x), p, key, learning_rate=0.3, estimator=estimator)
    )
    for axes, names in (
        (dict(pert=2, data=4), dict(pert_axis="pert", data_axis="data")),
        (dict(data=8), dict(data_axis="data")),
        (dict(pert=2, rest=4), dict(pert_axis="pert")),
    ):
        mesh = mesh_of(**axes)
        now, want = replicated(params, mesh), params
        step = jax.jit(
            lambda p, x, k, mesh=mesh, names=names: zo.distzo2_step(
                loss, p, x, k, learning_rate=0.3, epsilon=1e-2, mesh=mesh, **names
            )
        )
        step = step.lower(now, x, jax.random.key(0)).compile()
        for key in jax.random.split(jax.random.key(0), 3):
            now, info = step(now, x, key)
            want, alone = single(want, key)
            # Each loss is a mean of 256 terms, some units off in the last place; their difference over
            # 2 epsilon is off by as much over 2 epsilon, however small it is.
            slack = 8 * float(jnp.finfo(jnp.float32).eps) * float(alone.loss) / 2e-2
            assert abs(info.slope - alone.slope) < slack < 0.1 * abs(alone.slope)
        assert_close(now, want, "float32", times=10)
        replicas_agree(now)
        moved = exchanged(step.as_text())
        assert moved, "nothing was exchanged"
        assert set(moved) == {"f32[]"}, moved
    args = (loss, params, x, jax.random.key(0))
    with pytest.raises(ValueError, match="expected size 2"):
        zo.distzo2_step(*args, learning_rate=0.1, epsilon=1e-2, mesh=mesh_of(p=8), pert_axis="p")


def one_byte():
    params, x, loss = setup()
    mesh, limit, rate = mesh_of(worker=8), 1.0, 0.5
    step = jax.jit(
        lambda p, x, k: zo.one_byte_step(
            loss, p, x, k, learning_rate=rate, epsilon=1e-2, limit=limit, mesh=mesh, axis="worker"
        )
    )
    keys, log, now = jax.random.split(jax.random.key(0), 30), [], replicated(params, mesh)
    step = step.lower(now, x, keys[0]).compile()
    first = loss(params, x)
    for key in keys:
        before = now
        now, codes = step(now, x, key)
        assert codes.dtype == jnp.uint8
        assert codes.nbytes == 8
        log.append(codes)
    replicas_agree(now)
    assert loss(now, x) < 0.8 * first
    # The last step again in one process: every worker's direction, with slopes as the bytes say.
    estimator, want, displace = zo.two_point(1e-2, in_place=False), before, jax.jit(zo.displace)
    slope_of = jax.jit(lambda p, x, key: estimator(lambda p: loss(p, x), p, key, zo.gaussian).slope)
    for worker, share in enumerate(jnp.split(x, 8)):
        own = jax.random.fold_in(keys[-1], worker)
        value = float(dynamic8.decode(jnp.int32(codes[worker]))) * limit
        slope = np.clip(slope_of(before, share, own), -limit, limit)
        assert abs(value - slope) < 0.01 * limit
        want = displace(want, own, -rate * value / 8)
    assert_close(now, want, "float32")
    late = jax.jit(lambda k, c: zo.replay_bytes(params, k, c, learning_rate=rate, limit=limit))
    joined = late(keys, jnp.stack(log))
    jax.tree.map(np.testing.assert_array_equal, joined, now)
    assert set(exchanged(step.as_text())) == {"u8[8]"}


if __name__ == "__main__":
    distzo2()
    one_byte()
