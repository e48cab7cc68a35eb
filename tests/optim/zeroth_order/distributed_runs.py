"""Run by test_distributed.py on eight devices: DistZO2's forms, offloaded blocks in slices, one byte."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from frugax.optim import zeroth_order as zo
from frugax.optim.zeroth_order.one_byte import code_named
from tests.errors import assert_close
from tests.optim.zeroth_order.models import blocks_of_a_network


def setup():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(0.3 * rng.standard_normal((16, 8)), jnp.float32), "b": jnp.zeros(8)}
    x = jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)

    def loss(p, x):
        return jnp.mean((jnp.tanh(x @ p["w"] + p["b"][None]) - 0.5) ** 2)

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


def distzo2(every):
    params, x, loss = setup()
    estimator = zo.two_point(1e-2, in_place=False)
    single = jax.jit(
        lambda p, key: zo.zo_step(lambda p: loss(p, x), p, key, learning_rate=0.3, estimator=estimator)
    )
    for axes, names in (
        (dict(pert=2, data=4), dict(pert_axis="pert", data_axis="data")),
        (dict(data=8), dict(data_axis="data")),
        (dict(pert=2, rest=4), dict(pert_axis="pert")),
    )[: 3 if every else 1]:
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
        assert set(moved) == {"f64[]" if jax.config.jax_enable_x64 else "f32[]"}, moved
    nothing, info = step(now, x * jnp.nan, key)
    assert info.skipped
    jax.tree.map(np.testing.assert_array_equal, nothing, now)
    args = (loss, params, x, jax.random.key(0))
    with pytest.raises(ValueError, match="expected size 2"):
        zo.distzo2_step(*args, learning_rate=0.1, epsilon=1e-2, mesh=mesh_of(p=8), pert_axis="p")


def one_byte(every):
    """Samples of 8 workers, in both codes, against one process that takes all of their steps."""
    params, x, loss = setup()
    x = jnp.concatenate([x, x[::-1]])
    mesh, limit, rate = mesh_of(worker=8), 1.0, 0.5
    estimator, displace = zo.two_point(1e-2, in_place=False), jax.jit(zo.displace)
    slope_of = jax.jit(lambda p, x, key: estimator(lambda p: loss(p, x), p, key, zo.gaussian).slope)
    for samples, code, steps in ((2, "log", 8), (1, "dynamic", 30))[: 2 if every else 1]:
        step = jax.jit(
            lambda p, x, k, samples=samples, code=code: zo.one_byte_step(
                loss, p, x, k, learning_rate=rate, epsilon=1e-2, limit=limit, mesh=mesh, axis="worker",
                samples=samples, code=code,
            )
        )  # fmt: skip
        keys, log, now = jax.random.split(jax.random.key(0), steps), [], replicated(params, mesh)
        step = step.lower(now, x, keys[0]).compile()
        first = loss(params, x)
        for key in keys:
            before = now
            now, codes = step(now, x, key)
            assert codes.dtype == jnp.uint8
            assert codes.nbytes == 8 * samples
            log.append(codes)
        replicas_agree(now)
        assert loss(now, x) < (0.8 if steps > 8 else 0.95) * first
        # The last step again in one process: every direction, with slopes as the bytes say.
        want, (_, decode) = before, code_named(code)
        for i, share in enumerate(jnp.split(x, 8 * samples)):
            own = jax.random.fold_in(keys[-1], i)
            value = float(decode(codes[i])) * limit
            slope = np.clip(slope_of(before, share, own), -limit, limit)
            assert abs(value - slope) < (0.01 * limit if code == "dynamic" else 0.065 * abs(slope) + 1e-6)
            want = displace(want, own, -rate * value / (8 * samples))
        assert_close(now, want, "float32")
        late = jax.jit(
            lambda k, c, code=code: zo.replay_bytes(params, k, c, learning_rate=rate, limit=limit, code=code)
        )
        joined = late(keys, jnp.stack(log))
        jax.tree.map(np.testing.assert_array_equal, joined, now)
        assert set(exchanged(step.as_text())) == {f"u8[{8 * samples}]"}
        # A share with a NaN is sent as 255, and the mean is that of the others.
        with_nan, codes = step(before, x.at[9].set(jnp.nan), keys[-1])
        assert np.flatnonzero(np.asarray(codes) == 255).tolist() == [samples]
        want = before
        for i in set(range(8 * samples)) - {samples}:
            scalar = -rate * float(decode(codes[i])) * limit / (8 * samples - 1)
            want = displace(want, jax.random.fold_in(keys[-1], i), scalar)
        assert_close(with_nan, want, "float32")
        nothing, codes = step(before, x * jnp.nan, keys[-1])
        assert (np.asarray(codes) == 255).all()
        jax.tree.map(np.testing.assert_array_equal, nothing, before)
    for wrong in (dict(samples=3), dict(code="linear")):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            zo.one_byte_step(loss, params, x, keys[0], learning_rate=rate, epsilon=1e-2, limit=limit,
                             mesh=mesh, axis="worker", **wrong)  # fmt: skip


def sliced(every):
    """Offloaded blocks: each device uploads an eighth and gathers the rest; the steps are one device's."""
    functions, parts, batch = blocks_of_a_network()
    parts[0] = parts[0][:, :-1]  # 8 x 63 numbers and a bias of 63: no multiples of 8
    parts[1] = {"kernel": parts[1]["kernel"][:-1], "bias": parts[1]["bias"]}
    functions = [functions[0], lambda w, h: jnp.tanh(h @ w["kernel"] + w["bias"][None]), *functions[2:]]
    functions, parts = [*functions[:3], functions[-1]], [*parts[:3], parts[-1]]
    keys, put, sent = jax.random.split(jax.random.key(0), 2), jax.device_put, []

    def counted(x, to=None):
        placed = put(x, to)
        if to is not None:
            sent.extend(s.data.nbytes for a in jax.tree.leaves(placed) for s in a.addressable_shards)
        return placed

    def run(**how):
        blocks, pending, infos = parts, None, []
        for key in keys:
            blocks, pending, info = zo.zo2_step(
                functions, blocks, batch, key, pending=pending, learning_rate=0.05, epsilon=1e-2, **how
            )
            infos.append(info)
        return zo.zo2_flush(blocks, pending), infos

    want, alone = run()
    size = sum(x.nbytes for x in jax.tree.leaves(parts))
    mesh = mesh_of(pert=2, data=4)
    for axes in (dict(pert_axis="pert", data_axis="data"), dict(data_axis="data"))[: 2 if every else 1]:
        sent.clear()
        jax.device_put = counted
        try:
            got, infos = run(mesh=mesh, **axes)
        finally:
            jax.device_put = put
        for info, expected in zip(infos, alone, strict=True):
            assert abs(info.slope - expected.slope) < 8e-7 * abs(expected.loss) / 2e-2 + 1e-4
        assert_close(got, want, "float32", times=10)
        assert not any(
            (a == b).all() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(parts), strict=True)
        )
        assert 2 * size <= sum(sent) < 2.1 * size  # twice over two steps, not sixteen times


if __name__ == "__main__":
    every = sys.argv[1:] == ["every"]
    distzo2(every)
    one_byte(every)
    sliced(every)
