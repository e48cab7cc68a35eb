"""Run by test_conformance.py on eight devices: stacked matrices sharded both ways, against unsharded ones."""

import re
import sys

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import optim
from tests.errors import assert_close
from tests.optim.optimizers import CASES

# Each kind of state, projector and residual once, by the axes of the mesh. Their kin (apollo_mini, badam,
# fira, natural_galore...) do nothing else.
NAMES = {
    "few": {AxisType.Auto: ("galore", "apollo"), AxisType.Explicit: ("q_galore",)},
    "all": {
        AxisType.Auto: ("apollo", "frugal", "frugal_coordinates", "galore", "lion", "trion"),
        AxisType.Explicit: ("cosmos", "dct_adamw_feedback", "galore", "lisa", "q_galore"),
    },
}
SPECS = {"layers": {"kernel": P(None, "data", "model")}, "bias": P("model")}


def run(opt, tree, steps, init):
    """The params after some steps, and the state."""

    @jax.jit
    def step(tree, state):
        gradient = jax.tree.map(lambda x: jnp.sin(3 * x), tree)
        updates, state = opt.update(gradient, state, tree)
        return jax.tree.map(jnp.add, tree, updates), state

    state = init(tree)
    for _ in range(steps):
        tree, state = step(tree, state)
    return tree, state


def main(which):
    keys = jax.random.split(jax.random.key(0), 2)
    tree = {
        "layers": {"kernel": jax.random.normal(keys[0], (2, 12, 8))},
        "bias": jax.random.normal(keys[1], (4,)),
    }
    for kind, names in NAMES[which].items():
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
        put = lambda x, spec, mesh=mesh: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        for name in names:
            opt = CASES[name].make(CASES[name].rate)
            expected, _ = run(opt, tree, 3, jax.jit(opt.init))
            with jax.set_mesh(mesh):
                actual, state = run(opt, jax.tree.map(put, tree, SPECS), 3, opt.init)
            assert_close(jax.device_get(actual), expected, "float32", name=name)
            for got, spec in zip(jax.tree.leaves(actual), jax.tree.leaves(SPECS), strict=True):
                assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), got.ndim), (
                    name,
                    got.sharding,
                )
            if name == "galore":  # [2, 12, 8]: m = 8 lies along "model", n = 12 along "data"
                leaf = state[0].leaves["layers"]["kernel"]
                for x, spec in (
                    (leaf.projector, P(None, "model", None)),
                    (leaf.inner.mu, P(None, None, "data")),
                ):
                    assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3), x.sharding


def quiet():
    """Projecting the unsharded side takes no collective: no device needs another's rows."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for shape, spec in (((16, 6), P("data")), ((2, 6, 16), P(None, None, "data"))):
        x = {"kernel": jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))}
        for side, silent in (("unsharded", True), ("short" if shape[0] == 2 else "long", shape[0] == 2)):
            rule = optim.low_rank(
                optim.RandomBasis(2),
                optax.scale_by_adam(),
                optim.SignSGD(),
                spec=optim.MatrixSpec(partition={"kernel": spec}),
                side=side,
            )
            text = jax.jit(rule.update).lower(x, rule.init(x)).compile().as_text()
            assert silent != bool(
                re.search(r"(all-reduce|all-gather|all-to-all|permute)(-start)?\(", text)
            ), side


if __name__ == "__main__":
    main(sys.argv[1])
    quiet()
