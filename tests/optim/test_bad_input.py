"""Invalid arguments are refused before a step is taken, with the argument's and the leaf's name."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from frugax import optim

TREE = {"a": {"kernel": jnp.ones((4, 6))}, "b": {"kernel": jnp.ones((9, 8))}}


def test_a_rank_above_the_short_side():
    with pytest.raises(ValueError, match=r"rank: got 5; expected 1 to 4 for a/kernel of shape \[4, 6\]"):
        optim.galore(1e-3, rank=5).init(TREE)
    state = optim.galore(1e-3, rank=5, spec=optim.MatrixSpec(clamp=True)).init(TREE)
    assert state[0].leaves["a"]["kernel"].projector.shape == (4, 4)
    assert state[0].leaves["b"]["kernel"].projector.shape == (8, 5)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, None, "4"])
@pytest.mark.usefixtures("unchecked_types")
def test_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="rank: got"):
        optim.apollo(1e-3, rank=rank)


@pytest.mark.usefixtures("unchecked_types")
def test_a_rank_that_inject_hyperparams_made_an_array():
    with pytest.raises(ValueError, match="static_args"):
        optax.inject_hyperparams(optim.galore)(learning_rate=1e-3, rank=2).init(TREE)
    fits = optax.inject_hyperparams(optim.galore, static_args=("rank",))(learning_rate=1e-3, rank=2)
    updates, _ = jax.jit(fits.update)(TREE, fits.init(TREE), TREE)  # scale, update_interval, b1... are traced
    plain = optim.galore(1e-3, rank=2)
    expected, _ = jax.jit(plain.update)(TREE, plain.init(TREE), TREE)
    assert jnp.allclose(updates["a"]["kernel"], expected["a"]["kernel"], rtol=1e-5)


INJECTED = {
    optim.frugal: ("density",),
    optim.q_galore: ("group_size", "min_size", "queue", "rank"),
    optim.natural_galore: ("history", "rank"),
    optim.cosmos: ("ns_steps", "rank"),
    optim.trion: ("ns_steps", "rank"),
    **dict.fromkeys((optim.galore, optim.fira, optim.apollo, optim.apollo_mini, optim.dct_adamw), ("rank",)),
    **dict.fromkeys((optim.adamw_8bit, optim.lion_8bit, optim.sgdm_8bit, optim.adafactor_8bit), ()),
    optim.lion: (),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("make", INJECTED, ids=lambda make: make.__name__)
def test_what_inject_hyperparams_may_not_trace_says_so(make):
    """The error names the argument; with those that decide shapes named, all others may be traced."""
    needed = []
    takes_rank = "rank" in INJECTED[make]
    for _ in range(5):
        made = optax.inject_hyperparams(make, static_args=needed)(
            learning_rate=1e-3, **({"rank": 1} if takes_rank else {})
        )
        try:
            state = jax.eval_shape(made.init, TREE)
            jax.eval_shape(made.update, TREE, state, TREE)
            break
        except ValueError as error:
            needed += re.findall(r"name it in static_args=\('(\w+)',\)", str(error))
    assert tuple(sorted(needed)) == INJECTED[make]


@pytest.mark.parametrize(
    ("made", "used"),
    [
        (optim.galore(1e-3, rank=3), optim.galore(1e-3, rank=2)),
        (optim.apollo(1e-3, rank=3), optim.apollo(1e-3, rank=2)),
        (optim.apollo(1e-3, rank=2), optim.galore(1e-3, rank=2)),
        (optim.galore(1e-3, rank=2, side="long"), optim.galore(1e-3, rank=2)),
    ],
)
def test_going_on_with_another_rank(made, used):
    with pytest.raises(ValueError, match=r"state: got .* for a/kernel; expected .*, as in a state made"):
        jax.eval_shape(used.update, TREE, jax.eval_shape(made.init, TREE), TREE)


def test_names_that_are_none():
    with pytest.raises(ValueError, match="moments: got 'drop'"):
        optim.galore(1e-3, rank=2, moments="drop")
    with pytest.raises(ValueError, match="projector: got 'qr'"):
        optim.galore(1e-3, rank=2, projector="qr")
    with pytest.raises(ValueError, match="per: got 'row'"):
        optim.apollo(1e-3, rank=2, per="row")
    opt = optim.galore(1e-3, rank=2, projector="random", moments="transport")
    with pytest.raises(ValueError, match="can't transport"):
        jax.eval_shape(opt.update, TREE, jax.eval_shape(opt.init, TREE))
    with pytest.raises(ValueError, match="threshold"):
        optim.low_rank(optim.Gaussian(2), optax.identity(), refresh=optim.Refresh(9, threshold=0.4))


@pytest.mark.parametrize("residual", [optim.SGD(), optim.SignSGD(0.1), optim.Scaled("column")])
def test_what_a_gaussian_leaves_out_is_noise(residual):
    named = f"projector: got Gaussian, of which {type(residual).__name__}.*expected RandomBasis"
    with pytest.raises(ValueError, match=named):
        optim.low_rank(optim.Gaussian(2), optax.identity(), residual)
    optim.low_rank(optim.RandomBasis(2), optax.identity(), residual)
    optim.low_rank(optim.Gaussian(2), optax.identity(), optim.Scaled("column", whole=True))


def test_refreshes_that_are_none():
    with pytest.raises(ValueError, match=r"refresh: got 0 steps \(update_interval\)"):
        optim.galore(1e-3, rank=2, update_interval=0)
    with pytest.raises(ValueError, match="stagger: got True with a threshold"):
        optim.Refresh(9, stagger=True, threshold=0.4)
    with pytest.raises(ValueError, match=r"threshold: got 1\.5; expected a cosine"):
        optim.q_galore(1e-3, rank=2, threshold=1.5)


def test_more_active_layers_than_there_are():
    params = {"layers": {"w": jnp.ones((4, 3, 2)), "b": jnp.ones((6, 3))}}
    with pytest.raises(ValueError, match=r"^active: got 5; expected 1 to 4, the layers of params$"):
        optim.lisa(1e-3, active=5).init(params)


@pytest.mark.usefixtures("unchecked_types")
def test_keys_that_are_none():
    step = dict(learning_rate=0.1, epsilon=1e-3)
    for key, got in (
        (0, "0"),
        (jnp.arange(2), r"int\d\d\[2\]"),
        (jax.random.split(jax.random.key(0)), r"key.*\[2\]"),
    ):
        with pytest.raises(ValueError, match=f"^key: got {got}; expected one key, such as jax.random.key"):
            optim.mezo_step(jnp.sum, jnp.ones(3), key, **step)
        with pytest.raises(ValueError, match=f"^key: got {got}"):
            optim.zeroth_order.zo2_step([jnp.dot], [jnp.ones(3)], jnp.ones(3), key, pending=None, **step)
    optim.mezo_step(jnp.sum, jnp.ones(3), jax.random.PRNGKey(0), **step)  # the older kind


def test_a_fisher_of_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"params: got \[3\] at b; expected \[\.\.\., m, n\]"):
        optim.scale_by_fisher().init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})


def test_a_loss_that_is_no_scalar():
    for estimator in (optim.zeroth_order.two_point(1e-3), optim.zeroth_order.forward_gradient()):
        with pytest.raises(ValueError, match=r"loss_fn: got float32\[3\]; expected a scalar"):
            optim.zeroth_order.zo_step(
                lambda w: w**2,
                jnp.ones(3, jnp.float32),
                jax.random.key(0),
                learning_rate=0.1,
                estimator=estimator,
            )


def test_a_freeze_rate_and_a_dtype_that_are_none():
    with pytest.raises(ValueError, match=r"freeze_rate: got 1\.2; expected 0 to 1"):
        optim.slimfit(optax.adam(1e-3), 1.2)
    with pytest.raises(ValueError, match="dtype: got int8; expected bfloat16 or float16"):
        optim.round_stochastic(jnp.ones(3, jnp.float32), jnp.int8, jax.random.key(0))
