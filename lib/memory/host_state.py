"""An optimizer's state in the host's memory between its updates."""

from typing import Any

import jax
import optax


def state_on_host(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keep an optimizer's state in the host's memory; it visits the device for each update.

    The compiler copies a leaf there and back around its use, so that the device holds no more than what an
    update reads at a time. Only arrays move: numbers and updates are the optimizer's own. XLA's CPU compiler
    leaves everything where it is.

    Args:
      optimizer: any transformation; inside `optax.masked` that of some leaves alone. What chooses between two
        states, as `optax.MultiSteps` and `optax.apply_if_finite` do, goes inside: outside it would find one
        of them on the host and one on the device.

    Donate params and state together, or neither: JAX gives a donated array's place to the first result of its
    shape, and where the state alone is donated that is the update, which belongs on the device.

    Source: Dettmers et al. 2023, QLoRA (arXiv 2305.14314), whose pages move when the device's memory is full;
    here all of the state stays on the host at all times.

    Example:
        >>> import frugax, jax.numpy as jnp, optax
        >>> optimizer = frugax.memory.state_on_host(optax.adam(1e-3))
        >>> params = {"w": jnp.ones(3)}
        >>> state = optimizer.init(params)
        >>> state[0].mu["w"].sharding.memory_kind
        'pinned_host'
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Any:
        return jax.device_put(optimizer.init(params), jax.memory.Space.Host)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        state = jax.device_put(state, jax.memory.Space.Device)
        updates, state = optimizer.update(updates, state, params, **extra)
        return updates, jax.device_put(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)
