"""An optimizer's state on the host: the same steps, and memory of the host's kind before and after each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax.memory import state_on_host


def test_steps_are_the_optimizers_own_and_state_stays_on_the_host():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
    plain = optax.adamw(1e-2)
    paged = state_on_host(plain)
    kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}  # noqa: E731
    states = plain.init(params), paged.init(params)
    assert kinds(states[1]) == {"pinned_host"}
    for optimizer_step in (0, 1):
        grads = jax.tree.map(lambda x, i=optimizer_step: jnp.cos(x + i), params)
        wanted, mine = plain.update(grads, states[0], params), paged.update(grads, states[1], params)
        jax.tree.map(np.testing.assert_array_equal, wanted, mine)
        states = wanted[1], mine[1]
        assert kinds(states[1]) == {"pinned_host"}

    def step(params, state, grads):
        updates, state = paged.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    wanted = optax.apply_updates(params, plain.update(grads, states[0], params)[0])
    params, state = jax.jit(step, donate_argnums=(0, 1))(params, states[1], grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, wanted)
    assert kinds(state) == {"pinned_host"}


def test_a_wrapper_that_chooses_between_states_goes_inside():
    params = {"w": jnp.ones(3, jnp.float32)}
    paged = state_on_host(optax.apply_if_finite(optax.sgd(1.0, momentum=0.5), 3))
    update, state = jax.jit(paged.update), paged.init(params)
    for g, wanted in ((2.0, -2.0), (jnp.nan, 0.0), (1.0, -2.0)):  # the second leaves momentum as it was
        updates, state = update({"w": jnp.full(3, g, jnp.float32)}, state)
        np.testing.assert_array_equal(updates["w"], wanted)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}
