"""Run by test_flexsp.py on eight devices: a step in groups of several degrees is that of one device."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import frugax
from tests.errors import assert_close
from tests.planner.test_flexsp import COSTS

LENGTHS = [41, 6, 15, 18, 3, 7]
WIDTH, HEADS = 8, 2


def features(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def loss(params, x, y, ids, real, attention):
    """A sum over the tokens of one packed row, through an attention layer; padding is not real."""
    q, k, v = (a.reshape(*x.shape[:2], HEADS, -1) for a in jnp.split(jnp.tanh(x @ params["qkv"]), 3, -1))
    mixed = attention(q, k, v, segment_ids=ids).reshape(x.shape)
    return jnp.sum(real[..., None] * (jnp.tanh(x + mixed @ params["out"]) - y) ** 2)


def whole(q, k, v, segment_ids):
    t = jnp.arange(q.shape[1])
    sees = (segment_ids[:, :, None] == segment_ids[:, None]) & (t[:, None] >= t)
    s = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(sees[:, None], s, -1e30)), v)


def row(data, sequences, multiple):
    """Sequences end to end, filled up: features, targets, documents, and which tokens are real."""
    x, y = (jnp.concatenate([data[i][part] for i in sequences]) for part in (0, 1))
    ids = jnp.concatenate([jnp.full(LENGTHS[i], n) for n, i in enumerate(sequences)])
    pad = -len(ids) % multiple
    x, y = (jnp.pad(a, ((0, pad), (0, 0)))[None] for a in (x, y))
    real = jnp.pad(jnp.ones(len(ids)), (0, pad))[None]
    return x, y, jnp.pad(ids, (0, pad), constant_values=-1)[None], real


def main() -> None:
    params = {"qkv": features(0, WIDTH, 3 * WIDTH), "out": features(1, WIDTH, WIDTH)}
    data = [(features(2 * i, n, WIDTH), features(2 * i + 1, n, WIDTH)) for i, n in enumerate(LENGTHS)]
    step = frugax.planner.plan_step(LENGTHS, 8, COSTS, more=0)
    degrees = [group.degree for groups in step for group in groups]
    assert len(set(degrees)) > 1, step  # several degrees in one step
    split = P(None, "sequence")
    ring = partial(frugax.parallel.ring_attention, axis_name="sequence")
    total, grads = 0.0, jax.tree.map(jnp.zeros_like, params)
    for groups in step:
        for group, mesh in zip(groups, frugax.planner.group_meshes(groups), strict=True):

            def local(params, x, y, ids, real):
                return jax.lax.psum(loss(params, x, y, ids, real, ring), "sequence")

            f = jax.shard_map(local, mesh=mesh, in_specs=(P(), *(split,) * 4), out_specs=P())
            value, grad = jax.jit(jax.value_and_grad(f))(params, *row(data, group.sequences, group.degree))
            total += float(value)
            grads = jax.tree.map(lambda a, b: a + jax.device_get(b), grads, grad)
    every = row(data, range(len(LENGTHS)), 1)
    expected = jax.jit(jax.value_and_grad(partial(loss, attention=whole)))(params, *every)
    assert_close((jnp.float32(total), grads), expected, "float32")


if __name__ == "__main__":
    main()
