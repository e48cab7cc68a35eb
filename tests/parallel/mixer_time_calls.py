"""Run by test_over_time.py on eight devices: mixers with time split by the mesh in context, against one.

Packed documents, all gradients, the state carried in and out; and what travels, read off the program.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import frugax
from frugax.parallel import BATCH_AXES, make_mesh, place_activations
from frugax.planner.hlo import collectives
from tests.errors import assert_close

B, T, D = 4, 64, 16
ARGS = {
    "Based": {"key_size": 2, "window": 6},
    "GatedLinearAttention": {"heads": 2, "conv_width": 3},
    "LMU": {"order": 4, "theta": 20.0, "signals": 2},
    "LinearAttention": {"feature_map": "learned"},
    "LightningAttention": {"lrpe": True},
    "Mamba": {"state_size": 4},
    "Mamba2": {"state_size": 4, "heads": 4, "groups": 2},
    "SlidingWindowAttention": {"window": 21, "heads": 2},  # longer than a shard of a quarter
}
# Documents that end on shards' edges and within them, and that span several; ids come back.
SEGMENTS = jnp.array(
    [[0] * 5 + [1] * 27 + [2] * 32, [0] * 16 + [1] * 20 + [0] * 28, [0] * T, [3] * 30 + [4] * 34]
)


def check(name, sizes):
    mesh = make_mesh(**{"data": 1} | sizes)
    split = NamedSharding(mesh, P(BATCH_AXES, "sequence"))
    mixer = getattr(frugax.layers, name)(**ARGS.get(name, {}), backend="xla")
    x, weight, first = jax.random.normal(jax.random.key(0), (3, B, T, D))
    params = jax.jit(mixer.init)(jax.random.key(1), x[:1, :2])
    # Some start at zero.
    keys = iter(jax.random.split(jax.random.key(2), 100))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
    _, state = jax.jit(mixer.apply)(params, first[:, :9])

    def loss(params, x, state, ids):
        y, after = mixer.apply(params, place_activations(x), state=state, segment_ids=ids)
        y = place_activations(y)  # as a block does
        floats = [s for s in jax.tree.leaves(after) if jnp.issubdtype(s.dtype, jnp.floating)]
        return jnp.sum(y * weight) + sum(jnp.sum(s * jnp.cos(s)) for s in floats), (y, after)

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True, allow_int=True)
    want = jax.jit(run)(params, x, state, SEGMENTS)
    with jax.set_mesh(mesh):
        args = params, jax.device_put(x, split), state, jax.device_put(SEGMENTS, split)
        compiled = jax.jit(run).lower(*args).compile()
    got = compiled(*args)
    floats = lambda tree: [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]  # noqa: E731
    # The weighted sum of results cancels, so its relative error says nothing.
    assert_close(floats((got[0][1], got[1])), floats((want[0][1], want[1])), "float32", name=name)

    # Gradients of params are summed. All else that travels between shards of time are states, or less than
    # one shard of tokens.
    rows = B // (mesh.size // mesh.shape["sequence"] // mesh.shape["tensor"])
    shard = rows * T // mesh.shape["sequence"] * D * 4
    sent = [
        c for c in collectives(compiled.as_text(), mesh) if "sequence" in c.axes and c.kind != "all-reduce"
    ]
    assert sent, name
    most = max(shard, *(leaf.nbytes for leaf in jax.tree.leaves(state)))
    assert max(c.payload_bytes for c in sent) <= most, (name, most, sent)
    gathered = [c.payload_bytes for c in sent if c.kind == "all-gather"]
    assert max(gathered, default=0) <= rows * T * 4, (name, sent)  # places in documents at most


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        check(name, json.loads(sys.argv[2]))
