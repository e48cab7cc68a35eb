"""The factor of BlockFFN's sparsity loss against a loop over intervals, and how it enters a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax import moe


def by_interval(losses, first, stable, interval, rise, most):
    """Factors of all steps, interval by interval, in float64."""
    means = losses.reshape(-1, interval).mean(1)
    start, goal, factors = first, first, []
    for i in range(len(means)):
        factors += list(start + (goal - start) * (np.arange(interval) + 1) / interval)
        start = goal
        if (i + 1) * interval >= stable:
            ratio = means[i] / means[i - 1]
            goal = min(start * (max(ratio, rise) if ratio > 1 else ratio), most * first)
    return np.array(factors)


def test_factors_follow_the_loss():
    """Falling, hardly rising and doubling losses: down as they fall, up by 2.5 % at least, to the limit."""
    means = np.array([1.0, 0.8, 0.4, 0.39, 0.393, 0.5, 1.0, 2.0, 4.0, 4.0, 3.0])
    noise = np.random.default_rng(0).standard_normal((len(means), 5))
    losses = (means[:, None] + 0.05 * (noise - noise.mean(1, keepdims=True))).reshape(-1)
    schedule = moe.AdaptiveFactor(0.05, stable=15, interval=5, rise=1.025, most=4.0)

    def step(state, loss):
        return schedule.update(state, loss), state.factor

    last, factors = jax.jit(lambda losses: jax.lax.scan(step, schedule.init(), losses))(jnp.asarray(losses))
    want = by_interval(losses, 0.05, 15, 5, 1.025, 4.0)
    np.testing.assert_allclose(factors, want, rtol=1e-5)
    assert np.ptp(want[:15]) == 0
    assert want.min() < 0.03
    assert want.max() == pytest.approx(0.2)
    assert int(last.step) == len(losses)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
@pytest.mark.usefixtures("unchecked_types")
def test_an_interval_without_a_loss_moves_nothing(bad):
    schedule = moe.AdaptiveFactor(1.0, stable=4, interval=2)
    state = schedule.init()
    for loss in (1.0, 1.0, bad, bad, 0.5, 0.5):
        state = schedule.update(state, loss)
    assert float(state.goal) == 0.5
    with pytest.raises(ValueError, match=r"loss: got \[3\]; expected a scalar"):
        schedule.update(state, jnp.ones(3))


def test_weights_in_place_of_the_layers():
    """Losses weighed from outside have the value and the gradients of `loss_weights`."""
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    weights = {"activation_locality": 0.5, "chunk_sparsity": 2.0}
    layer = frugax.layers.MoE(
        experts=4,
        k=1,
        router="relu_route",
        router_args={"steepness": 1.0},
        loss_weights=weights,
        dispatch="dense",
    )
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]

    @jax.jit
    def both(params, weights):
        def loss(params, weights):
            return moe.total_loss(layer.apply({"params": params}, x, mutable=["moe"])[1], weights)

        return [jax.value_and_grad(loss)(params, given) for given in (None, weights)]

    (own, own_grads), (given, grads) = both(params, weights)
    np.testing.assert_allclose(given, own, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(own_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert np.abs(grads["router"]["kernel"]).max() > 1e-3
    sown = {"layer": {"statistics": {"losses": {"z": jnp.ones(3)}}}}  # of three layers, in a scan
    assert float(moe.total_loss(sown, {"z": 0.5})) == 1.5
    with pytest.raises(ValueError, match="weights: got 'load'; expected losses of the layers: z"):
        moe.total_loss(sown, {"load": 1.0})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"first": 0.0}, "first: got 0.0; expected a number above 0"),
        ({"interval": 0}, "interval: got 0; expected a number >= 1"),
        ({"interval": 2.5}, "interval, stable: got 2.5, 1000; expected whole numbers of steps"),
        ({"stable": 150}, "stable: got 150; expected a number >= 200"),
        ({"rise": 0.5}, "rise: got 0.5; expected a number >= 1"),
        ({"most": float("nan")}, "most: got nan; expected a number >= 1"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(changes, says):
    with pytest.raises(ValueError, match=says):
        moe.AdaptiveFactor(**{"first": 0.05} | changes)
