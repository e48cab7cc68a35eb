"""Run by test_sequence.py on eight devices: operations with time split in eight, against whole ones."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import frugax
from tests.errors import assert_close

B, T, H, K, V, D, W = 2, 64, 2, 3, 2, 5, 4
# Documents that end on shards' edges (every 8 tokens), within them, and that span several; ids come back.
SEGMENTS = jnp.array([[0] * 3 + [1] * 9 + [2] * 4 + [3] * 32 + [0] * 16, [0] * 8 + [1] * 15 + [0] * 41])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def attention(decay):
    args = {"q": normal(0, B, T, H, K), "k": normal(1, B, T, 1, K), "v": normal(2, B, T, H, V)}
    split = {*args, "log_decay"} if len(decay) > 1 else set(args)
    args |= {"bonus": normal(3, H, K), "initial_state": normal(4, B, H, K, V)}
    args["log_decay"] = -0.2 * jnp.abs(normal(5, *decay))
    return "linear_attention", args, split, B * H * K * (V + 1)


def recurrence():
    args = {
        "a": normal(0, B, T, D).at[0, 5].set(0),
        "b": normal(1, B, T, D),
        "initial_state": normal(2, B, D),
    }
    return "linear_recurrence", args, {"a", "b"}, B * D * 2


def convolution():
    args = {"x": normal(0, B, T, D), "weight": normal(1, W, D), "bias": normal(2, D)}
    return "causal_conv1d", args | {"initial_state": normal(3, B, W - 1, D)}, {"x"}, B * (W - 1) * D


CASES = {
    "fixed": partial(attention, (H,)),
    "scalar": partial(attention, (B, T, H)),
    "channel": partial(attention, (B, T, H, K)),
    "recurrence": recurrence,
    "convolution": convolution,
}


def weighted(results):
    """A scalar that every element of the results moves by its own weight."""
    return sum(jnp.sum(x * normal(9, *x.shape)) for x in results)


def outputs(value_and_gradients):
    (_, results), gradients = value_and_gradients
    return results, gradients


def check(name, backend, packed, mesh):
    op, args, split, state_size = CASES[name]()
    ids = {"segment_ids": SEGMENTS} if packed else {}
    place = {n: P(None, "time") if n in split else P() for n in args}
    per_shard = partial(getattr(frugax.parallel, op), axis_name="time", backend=backend)
    sharded = jax.shard_map(
        lambda args, ids: per_shard(**args, **ids),
        mesh=mesh,
        in_specs=(place, dict.fromkeys(ids, P(None, "time"))),
        out_specs=(P(None, "time"), P()),
    )

    def both(f):
        return jax.jit(
            jax.value_and_grad(lambda args, ids: (lambda r: (weighted(r), r))(f(args, ids)), has_aux=True)
        )

    whole = partial(getattr(frugax.kernels, op), backend="reference")
    wanted = both(lambda args, ids: whole(**args, **ids))(args, ids)
    put = {n: jax.device_put(x, NamedSharding(mesh, place[n])) for n, x in args.items()}
    compiled = both(sharded).lower(put, ids).compile()
    # Results and gradients; their weighted sum cancels, so its relative error says nothing.
    assert_close(outputs(compiled(put, ids)), outputs(wanted), "float32", name=name)

    collectives = re.findall(
        r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    # W-1 tokens, states or their maps: what eight shards gather is the most; weights' gradients are smaller.
    shapes = [dims for result in collectives for dims in re.findall(r"[a-z]\d+\[([\d,]*)\]", result)]
    sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in shapes]
    assert sizes, name
    assert max(sizes) <= 8 * state_size, (name, shapes)
    assert not any(dims.startswith(f"{B},{T // 8},") for dims in shapes), (name, shapes)  # a shard's tokens


if __name__ == "__main__":
    mesh = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,))
    for packed in (False, True):
        check(sys.argv[1], sys.argv[2], packed, mesh)
