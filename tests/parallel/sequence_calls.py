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
from frugax.parallel import over_time
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
    return "linear_attention", args, split, B * H * K * V


def recurrence():
    args = {
        "a": normal(0, B, T, D).at[0, 5].set(0),
        "b": normal(1, B, T, D),
        "initial_state": normal(2, B, D),
    }
    return "linear_recurrence", args, {"a", "b"}, B * D


def convolution():
    args = {"x": normal(0, B, T, D), "weight": normal(1, W, D), "bias": normal(2, D)}
    return "causal_conv1d", args | {"initial_state": normal(3, B, W - 1, D)}, {"x"}, B * (W - 1) * D


def scan():
    args = {"x": normal(0, B, T, D), "dt": normal(1, B, T, D), "A": -jnp.exp(normal(2, D, K))}
    args |= {"B": normal(3, B, T, K), "C": normal(4, B, T, K), "z": normal(5, B, T, D)}
    args |= {"D": normal(6, D), "dt_bias": normal(7, D), "initial_state": normal(8, B, D, K)}
    return "selective_scan", args, {"x", "dt", "B", "C", "z"}, B * D * K


def dual():
    args = {"x": normal(0, B, T, H, V), "dt": normal(1, B, T, H), "A": -jnp.exp(normal(2, H))}
    args |= {"B": normal(3, B, T, 1, K), "C": normal(4, B, T, 1, K), "z": normal(5, B, T, H, V)}
    args |= {"D": normal(6, H), "dt_bias": normal(7, H), "initial_state": normal(8, B, H, K, V)}
    return "ssd", args, {"x", "dt", "B", "C", "z"}, B * H * K * V


def legendre():
    return "lmu", {"u": normal(0, B, T, D), "initial_state": normal(1, B, D, K)}, {"u"}, B * D * K


def trapezoid():
    args = {"x": normal(0, B, T, H, V), "dt": jnp.abs(normal(1, B, T, H)), "A": -jnp.exp(normal(2, B, T, H))}
    args |= {"B": normal(3, B, T, 1, K), "C": normal(4, B, T, 1, K), "D": normal(6, H)}
    args["mix"] = jax.nn.sigmoid(normal(5, B, T, H))
    first = (normal(8, B, H, K, V), normal(9, B, 1, K), normal(10, B, H, V))
    args["initial_state"] = frugax.kernels.TrapezoidalState(*first)
    return "trapezoidal_ssd", args, {"x", "dt", "A", "B", "C", "mix"}, B * H * K * V


OPTIONS = {"selective_scan": {"dt_softplus": True}, "ssd": {"dt_softplus": True}}
OPTIONS["lmu"] = {"order": K, "theta": 20.0}
CASES = {
    "fixed": partial(attention, (H,)),
    "scalar": partial(attention, (B, T, H)),
    "channel": partial(attention, (B, T, H, K)),
    "recurrence": recurrence,
    "convolution": convolution,
    "scan": scan,
    "dual": dual,
    "legendre": legendre,
    "trapezoid": trapezoid,
}


def weighted(results):
    """A scalar that every element of the results moves by its own weight."""
    return sum(jnp.sum(x * normal(9, *x.shape)) for x in jax.tree.leaves(results))


def outputs(value_and_gradients):
    (_, results), gradients = value_and_gradients
    return results, gradients


def check(name, backend, packed, mesh):
    op, args, split, state_size = CASES[name]()
    options = OPTIONS.get(op, {})
    chosen = {} if op == "lmu" else {"backend": backend}
    ids = {"segment_ids": SEGMENTS} if packed else {}
    place = {n: P(None, "time") if n in split else P() for n in args}
    per_shard = partial(getattr(frugax.parallel, op), axis_name="time", **options, **chosen)
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

    chosen = {} if op == "lmu" else {"backend": "reference"}
    whole = partial(getattr(frugax.kernels, op), **options, **chosen)
    wanted = both(lambda args, ids: whole(**args, **ids))(args, ids)
    put = {n: jax.device_put(x, NamedSharding(mesh, place[n])) for n, x in args.items()}
    compiled = both(sharded).lower(put, ids).compile()
    # Results and gradients; their weighted sum cancels, so its relative error says nothing.
    assert_close(outputs(compiled(put, ids)), outputs(wanted), "float32", name=name)

    collectives = re.findall(
        r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    # W-1 tokens, states or their decays; weights' gradients are smaller.
    shapes = [dims for result in collectives for dims in re.findall(r"[a-z]\d+\[([\d,]*)\]", result)]
    sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in shapes]
    assert sizes, name
    assert max(sizes) <= state_size, (name, shapes)
    assert not any(dims.startswith(f"{B},{T // 8},") for dims in shapes), (name, shapes)  # a shard's tokens


def check_nan_stays(name, mesh):
    """A document of NaN that starts in one shard and ends in a later one leaves all others as they are."""
    op, args, split, _ = CASES[name]()
    options = OPTIONS.get(op, {}) | ({} if op == "lmu" else {"backend": "xla"})
    bad = (SEGMENTS == 1)[..., None]  # one document of each row
    for n in split:
        mask = bad.reshape(*bad.shape[:2], *[1] * (args[n].ndim - 2))
        args[n] = jnp.where(mask, jnp.nan, args[n])
    place = {n: P(None, "time") if n in split else P() for n in args}
    f = jax.shard_map(
        lambda args, ids: getattr(frugax.parallel, op)(**args, segment_ids=ids, axis_name="time", **options),
        mesh=mesh,
        in_specs=(place, P(None, "time")),
        out_specs=(P(None, "time"), P()),
    )
    y, state = jax.jit(f)(args, SEGMENTS)
    is_bad = ~np.isfinite(np.asarray(y)).reshape(B, T, -1).all(-1)
    np.testing.assert_array_equal(is_bad, SEGMENTS == 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def check_rows(name):
    """Padded rows, and the states of documents, by the mesh in context: as of one device, with gradients."""
    op, args, split, _ = CASES[name]()
    options = OPTIONS.get(op, {}) | ({} if op == "lmu" else {"backend": "xla"})
    lengths = jnp.array([37, 9])  # in the middle of shards; six shards of the second row hold nothing real
    padding = jnp.arange(T)[None] >= lengths[:, None]
    mask = lambda x: padding.reshape(*padding.shape, *[1] * (x.ndim - 2))  # noqa: E731
    args = {n: jnp.where(mask(x), jnp.nan, x) if n in split else x for n, x in args.items()}
    mesh = frugax.parallel.make_mesh(data=1, sequence=8)

    def both(fn):
        def loss(args, ids, lengths):
            of_last = fn(**args, segment_ids=ids, lengths=lengths, **options)
            _, of_documents = fn(**args, segment_ids=ids, lengths=lengths, segment_states=4, **options)
            results = (*of_last, of_documents)
            return weighted(results), results

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    wanted = both(getattr(frugax.kernels, op))(args, SEGMENTS, lengths)
    with jax.set_mesh(mesh):
        got = both(getattr(over_time, op))(args, SEGMENTS, lengths)
    assert_close(outputs(got), outputs(wanted), "float32", name=name)


def check_extremes(mesh):
    """Gates that are shut, products that leave float32's range beside zeros, and more documents than a byte
    counts: as of one device, gradients too."""
    shut = (
        jnp.full((B, T, H), -0.1)
        .at[0, jnp.array([5, 8, 33])]
        .set(jnp.array([-jnp.inf, -1e30, -1e4])[:, None])
    )
    q, k, v = normal(0, B, T, H, K), normal(1, B, T, 1, K), normal(2, B, T, H, V)
    grow = jnp.array([1e30, 1e30, *[0.0, 1e30, 1e-30, 1e-30] * (T // 4)])[None, :T, None]
    add = jnp.array([0.0, 1e-30, *[1.0, 0.0, 1.0, 0.0] * (T // 4)])[None, :T, None]
    attention = {"q": q, "k": k, "v": v, "log_decay": shut}
    for op, args in (("linear_attention", attention), ("linear_recurrence", {"a": grow, "b": add})):
        place = dict.fromkeys(args, P(None, "time"))
        split = jax.shard_map(
            lambda args, op=op: getattr(frugax.parallel, op)(**args, axis_name="time", backend="xla"),
            mesh=mesh,
            in_specs=(place,),
            out_specs=(P(None, "time"), P()),
        )
        whole = partial(getattr(frugax.kernels, op), backend="reference")
        slopes, others = (
            jax.jit(jax.grad(lambda args, f=f: jnp.sum(f(args)[0])))(args)
            for f in (split, lambda args, f=whole: f(**args))
        )
        got, want = jax.jit(split)(args), jax.jit(lambda args, f=whole: f(**args))(args)
        assert_close((got, slopes), (want, others), "float32", name=op)


def check_many_documents(mesh):
    """Ids in 8 bits and 256 documents in a shard: none goes on with the state before it."""
    length = 8 * 264
    x, ids = normal(0, 1, length, 1, 2), (jnp.arange(length) % 2)[None]
    for dtype in (jnp.int8, jnp.uint8):
        split = jax.shard_map(
            lambda x, ids: frugax.parallel.linear_attention(x, x, x, segment_ids=ids, axis_name="time")[0],
            mesh=mesh,
            in_specs=(P(None, "time"), P(None, "time")),
            out_specs=P(None, "time"),
        )
        alone = jnp.sum(x * x, axis=-1, keepdims=True) * x / 2**0.5  # each token is a document
        assert_close(jax.jit(split)(x, ids.astype(dtype)), alone, "float32", name=str(dtype))


if __name__ == "__main__" and sys.argv[2] == "rows":
    for case in sys.argv[1].split(","):
        check_rows(case)
elif __name__ == "__main__" and sys.argv[1] == "extremes":
    mesh = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,))
    check_extremes(mesh)
    check_many_documents(mesh)
elif __name__ == "__main__":
    mesh = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,))
    for packed in (False, True):
        check(sys.argv[1], sys.argv[2], packed, mesh)
    if sys.argv[2] == "xla":
        check_nan_stays(sys.argv[1], mesh)
