"""Run by test_attention.py on eight devices: split attention and collective products against whole ones."""

import functools
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import frugax
from tests.errors import assert_close

B, T, H, D, V = 2, 24, 8, 5, 3
SEGMENTS = jnp.array([[0] * 2 + [1] * 9 + [0] * 13, [3] * 24])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def definition(q, k, v, causal, segment_ids):
    """Whole attention in float64 NumPy-like form, by a mask."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    t = jnp.arange(s.shape[-1])
    sees = (t[:, None] >= t[None]) if causal else jnp.ones_like(s[0, 0], bool)
    sees = jnp.broadcast_to(sees[None], (q.shape[0], *sees.shape))
    if segment_ids is not None:
        number = jnp.cumsum(jnp.diff(segment_ids, prepend=segment_ids[:, :1]) != 0, 1)
        sees = sees & (number[:, :, None] == number[:, None])
    p = jax.nn.softmax(jnp.where(sees[:, None], s, -jnp.inf), -1)
    return jnp.einsum("bhts,bshd->bthd", p, v)


def over_devices(f, split, with_ids):
    mesh = frugax.parallel.make_mesh(sequence=8, data=1)
    specs = (split,) * (4 if with_ids else 3)
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=split)


def balanced(kind):
    """Packed documents placed so that ranks have equal work have the numbers of those in order."""
    q, k, v = normal(0, B, T, H, D), normal(1, B, T, 4, D), normal(2, B, T, 4, V)
    lengths = [[len(list(run)) for _, run in itertools.groupby(row)] for row in SEGMENTS.tolist()]
    order = np.stack([frugax.planner.balanced_order(row, 8).ravel() for row in lengths])
    ids = jnp.stack([np.repeat(np.arange(len(row)), row) for row in lengths])
    put = lambda x, at: jnp.take_along_axis(x, jnp.expand_dims(at, range(2, x.ndim)), 1)  # noqa: E731

    def run(q, k, v, ids, at):
        return getattr(frugax.parallel, kind)(q, k, v, axis_name="sequence", segment_ids=ids, positions=at)

    mesh, split = frugax.parallel.make_mesh(sequence=8, data=1), P(None, "sequence")
    shards = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split)

    def placed(q, k, v):
        back = jnp.argsort(order, 1)
        return put(shards(*(put(x, order) for x in (q, k, v, ids)), order), back)

    whole = lambda q, k, v: definition(q, k, v, True, SEGMENTS)  # noqa: E731
    loss = lambda f: lambda *args: jnp.sum(f(*args) * normal(3, B, T, H, V))  # noqa: E731
    assert_close(jax.jit(placed)(q, k, v), whole(q, k, v), "float32")
    grads = (jax.jit(jax.grad(loss(f), (0, 1, 2)))(q, k, v) for f in (placed, whole))
    assert_close(*grads, "float32")
    assert (np.diff(order) < 0).any()  # and no shard of time


def attention(kind, heads, packed, causal):
    q, k, v = normal(0, B, T, H, D), normal(1, B, T, heads, D), normal(2, B, T, heads, V)
    ids = SEGMENTS if packed else None
    how = {"causal": causal}
    if kind == "ulysses":
        whole = functools.partial(_by_definition, causal)
        f = functools.partial(frugax.parallel.ulysses_attention, whole, axis_name="sequence")
    else:
        f = functools.partial(getattr(frugax.parallel, kind), axis_name="sequence", **how)

    def run(*args):
        q, k, v, *ids = args
        return f(q, k, v, **({"segment_ids": ids[0]} if ids else {}))

    split = over_devices(run, P(None, "sequence"), packed)
    loss = lambda f: lambda *args: jnp.sum(f(*args) * normal(3, B, T, H, V))  # noqa: E731
    given = (q, k, v) + ((ids,) if packed else ())
    got = jax.jit(split)(*given)
    grads = jax.jit(jax.grad(loss(split), (0, 1, 2)))(*given)
    whole = lambda q, k, v: definition(q, k, v, causal, ids)  # noqa: E731
    assert_close(got, whole(q, k, v), "float32")
    assert_close(grads, jax.jit(jax.grad(loss(whole), (0, 1, 2)))(q, k, v), "float32")
    if kind != "ulysses" and not packed:  # no device holds all keys
        compiled = jax.jit(split).lower(*given).compile()
        text = compiled.as_text()
        sent = len(re.findall(r" collective-permute(?:-start)?\(", text))
        assert sent == (14 if kind == "ring_self_attention" else 2), sent  # two rings of 7; k and v in a loop
        assert "all-gather" not in text
        if (
            kind == "ring_self_attention"
        ):  # a row of scores a query: T * T / 8, twice at most with the softmax
            rows = 4 * B * H * T * T / 8
            assert rows < compiled.memory_analysis().temp_size_in_bytes < 4 * rows


def _by_definition(causal, q, k, v, segment_ids=None):
    return definition(q, k, v, causal, segment_ids)


def products(rows):
    """Both rings equal the whole product, forward and backward, and travel in pieces."""
    mesh = frugax.parallel.make_mesh(tensor=8, data=1)
    x, w, w2 = normal(0, 8 * rows, 16), normal(1, 16, 24), normal(2, 24, 16)
    tensor = P(None, "tensor")

    def block(x, w, w2):  # Megatron's pair, with the rows of the stream split between: sequence parallel
        h = frugax.parallel.all_gather_matmul(x, w, axis_name="tensor")
        return frugax.parallel.matmul_reduce_scatter(jnp.tanh(h), w2, axis_name="tensor")

    f = jax.shard_map(block, mesh=mesh, in_specs=(P("tensor"), tensor, P("tensor")), out_specs=P("tensor"))
    whole = lambda x, w, w2: jnp.tanh(x @ w) @ w2  # noqa: E731
    loss = lambda f: lambda *args: jnp.sum(jnp.sin(f(*args)))  # noqa: E731
    assert_close(jax.jit(f)(x, w, w2), whole(x, w, w2), "float32")
    both = jax.jit(jax.grad(loss(f), (0, 1, 2)))
    assert_close(both(x, w, w2), jax.grad(loss(whole), (0, 1, 2))(x, w, w2), "float32")
    text = both.lower(x, w, w2).compile().as_text()
    assert len(re.findall(r"collective-permute(?:-start)?\(", text)) >= 4 * 7
    assert not re.search(r"(all-gather|reduce-scatter)(-start)?\(", text)
    np.testing.assert_array_less(0, float(jnp.abs(x).sum()))


if __name__ == "__main__":
    if sys.argv[1] == "products":
        products(int(sys.argv[2]))
    elif sys.argv[2] == "balanced":
        balanced(sys.argv[1])
    else:
        kind, heads, packed, causal = sys.argv[1:]
        attention(kind, int(heads), packed == "packed", causal == "causal")
