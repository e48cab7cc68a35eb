"""Run by test_eight_bit.py on eight devices: leaves sharded two ways stay so, with one device's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import frugax

SPECS = {"matrix": P("data", "model"), "stack": P(None, "data", "model"), "odd": P("model", None)}
SHAPES = {"matrix": (16, 2048), "stack": (2, 8, 1024), "odd": (16, 300)}


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    tree = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
        at = {n: NamedSharding(mesh, spec) for n, spec in SPECS.items()}
        placed = jax.tree.map(jax.device_put, tree, at)
        for backend in (None, "pallas_tpu"):
            names = ["matrix", "stack"] if backend else list(SPECS)
            how = frugax.optim.EightBit(group_size=128, backend=backend)
            tx = frugax.optim.adamw_8bit(1e-2, moments=how)

            @jax.jit
            def step(tree, state, tx=tx):
                updates, state = tx.update(jax.tree.map(lambda x: jnp.sin(3 * x), tree), state, tree)
                return jax.tree.map(jnp.add, tree, updates), state

            results = []
            for start in (tree, placed):
                now = {n: start[n] for n in names}
                state = tx.init(now)
                for _ in range(3):
                    now, state = step(now, state)
                results.append((now, state))
            (want, _), (got, state) = results
            for n in names:
                np.testing.assert_allclose(got[n], want[n], rtol=2e-6, atol=2e-6)
                codes = state[0].moments[0][n].codes
                assert got[n].sharding.is_equivalent_to(at[n], got[n].ndim), (n, got[n].sharding)
                assert codes.sharding.is_equivalent_to(at[n], codes.ndim), (n, codes.sharding)
            text = step.lower({n: placed[n] for n in names}, state).compile().as_text()
            assert "all-gather" not in text, f"{backend}, {kind}: a leaf is gathered"


if __name__ == "__main__":
    main()
