"""Run by test_placement.py on eight devices: experts with any copies are those of one device."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import frugax
from tests.errors import assert_close
from tests.parallel.expert_calls import E, K, T, arguments, both, glu, losses, one_device

SLOTS = 3


def layer(mesh, per_pair, node, rematerialize):
    """A function of x and params, with copies among params so that they are an argument of one program."""

    def local(x, params, copies):
        logits = x @ params["router"]
        routing = frugax.moe.softmax_top_k(logits, K)
        y, load = frugax.parallel.expert_parallel_with_copies(
            x,
            routing,
            glu,
            params["experts"],
            copies,
            axis_name=("data", "tensor"),
            per_pair=per_pair,
            node=node,
            rematerialize=rematerialize,
        )
        return y, losses(logits, routing, ("data", "tensor")), load

    split = P(("data", "tensor"))
    specs = split, {"router": P(), "experts": split}, P()
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(split, P(), P()))


def check(mesh, per_pair, node, rematerialize) -> None:
    x, params = arguments()
    params["router"] = params["router"] + jnp.arange(E)[None] * 0.5  # nearly all to the last device
    x = jnp.abs(x)
    wanted, _ = jax.jit(both(lambda x, params: (*one_device(x, params, np.ones((8 * T, K))), ())))(x, params)
    f = layer(mesh, per_pair, node, rematerialize)
    run = lambda x, params, copies: both(lambda x, params: f(x, params, copies))(x, params)  # noqa: E731
    compiled = jax.jit(run).lower(x, params, jnp.zeros((8, SLOTS), jnp.int32)).compile()
    indices = np.asarray(frugax.moe.softmax_top_k(x @ params["router"], K).indices)
    tokens = np.bincount(indices.reshape(-1), minlength=E)
    plan = frugax.parallel.plan_placement(jnp.array(tokens), devices=8, slots=SLOTS, per_pair=per_pair)
    placements = {
        "none": np.full((8, SLOTS), -1),
        "planned": plan,
        "random": np.random.default_rng(0).integers(-1, E, (8, SLOTS)),
        "the same everywhere": np.tile([E - 1, E - 1, E - 2], (8, 1)),  # twice, and on its owner
        "out of bounds": np.tile([E + 5, 2, -7], (8, 1)),
    }
    busiest = {}
    for name, copies in placements.items():
        got, load = compiled(x, params, jnp.asarray(copies, jnp.int32))
        assert_close(got, wanted, "float32", name=name)
        np.testing.assert_array_equal(load.tokens, tokens)
        assert float(load.dropped) == 0
        busiest[name] = int(load.busiest)
    assert busiest["none"] == tokens.reshape(8, -1).sum(1).max()
    assert busiest["planned"] <= 0.6 * busiest["none"]
    if rematerialize:
        for again in (False, True):
            f = layer(mesh, per_pair, node, again)
            kept = jax.eval_shape(lambda f=f: jax.vjp(lambda p: f(x, p, plan)[0], params)[1])
            experts = [a.shape for a in jax.tree.leaves(kept) if a.ndim > 2 and a.dtype == jnp.float32]
            assert any(shape[0] == E + 8 * SLOTS for shape in experts) == (not again), experts


if __name__ == "__main__":
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    cases = {"plain": (None, 1, False), "bounded": (1, 2, True)}
    check(mesh, *cases[sys.argv[1]])
