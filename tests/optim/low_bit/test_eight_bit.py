"""8-bit optimizers against float64 numpy for 50 steps, and through wrappers, placements, interruptions."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import frugax
from frugax.kernels.quantized_update.tiling import CHUNK
from frugax.optim import EightBit, state_bytes
from tests.devices import run_on_eight_devices
from tests.errors import assert_close
from tests.kernels.quantized_update.definition import check_step

MAKE = {
    "adam_8bit": frugax.optim.adam_8bit,
    "adamw_8bit": frugax.optim.adamw_8bit,
    "lion_8bit": frugax.optim.lion_8bit,
    "sgdm_8bit": frugax.optim.sgdm_8bit,
    "adafactor_8bit": frugax.optim.adafactor_8bit,
}
RATE = {"sgdm_8bit": 3e-3, "adafactor_8bit": 3e-2}
NAMES = sorted(MAKE)


def dear(*names):
    """All optimizers; in the default tier `names` alone, which differ in state or rule."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=() if n in names else pytest.mark.full) for n in NAMES]
    )


def params(dtype=jnp.float32):
    """A matrix of whole groups, a stack with short ones, a leaf too small for 8 bits."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"matrix": (16, 512), "stack": (2, 20, 300), "bias": (7,)}
    return {n: jax.random.normal(k, s, dtype) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def loss_of(tree):
    scales = {"matrix": 1.0, "stack": 0.1, "bias": 1.0}
    return 0.5 * sum(scales[n] * jnp.sum((x.astype(jnp.float32) - 1) ** 2) for n, x in tree.items())


def optimizer(name, rate=None):
    return MAKE[name](RATE.get(name, 1e-2) if rate is None else rate)


@functools.cache
def compiled(name):
    """The optimizer, a jitted step on a quadratic, and the list that grows with each trace of it."""
    traces, tx = [], optimizer(name, optax.linear_schedule(RATE.get(name, 1e-2), 0.0, 1000))

    @jax.jit
    def step(tree, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss_of)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    return tx, step, traces


OURS = EightBit(group_size=128, min_size=0)
PAPERS = EightBit(group_size=128, min_size=0, signed="dynamic8", unsigned="udynamic8")


@pytest.mark.parametrize(
    ("rule", "how"),
    [
        *[pytest.param(rule, OURS, id=rule) for rule in ("adam", "lion", "momentum", "nesterov")],
        pytest.param("adam", PAPERS, id="adam-paper's"),
        *[
            pytest.param(rule, PAPERS, id=f"{rule}-paper's", marks=pytest.mark.full)
            for rule in ("lion", "momentum", "nesterov")
        ],
    ],
)
def test_fifty_steps_are_the_definition(rule, how):
    """Every step follows in float64 from the state before it: no error of one step hides in another's."""
    hyper = {
        "adam": lambda t: (0.9, 0.99, 1e-8, 1 / (1 - 0.9**t), 1 / (1 - 0.99**t)),
        "lion": lambda t: (0.8, 0.95),
        "momentum": lambda t: (0.7,),
        "nesterov": lambda t: (0.7,),
    }
    tx = {
        "adam": frugax.optim.adam_8bit(-1.0, 0.9, 0.99, moments=how),
        "lion": frugax.optim.lion_8bit(-1.0, 0.8, 0.95, weight_decay=0.0, moments=how),
        "momentum": frugax.optim.sgdm_8bit(-1.0, 0.7, moments=how),
        "nesterov": frugax.optim.sgdm_8bit(-1.0, 0.7, nesterov=True, moments=how),
    }[rule]
    rng = np.random.default_rng(0)
    shape = (5, 300)
    size = 10 ** rng.uniform(-3, 0, shape)
    w = jnp.zeros(shape)
    state, update = jax.jit(tx.init)(w), jax.jit(tx.update)
    for t in range(1, 51):
        g = jnp.asarray(size * rng.standard_normal(shape), jnp.float32)
        u, new = update(g, state, w)
        check_step(rule, g, state[0].moments, new[0].moments, u, hyper[rule](t), name=f"step {t}")
        assert new[0].count == t
        state = new


def test_weight_decay_and_rate_are_adamws():
    tree, how = {n: x for n, x in params().items() if n != "stack"}, EightBit()
    tx = frugax.optim.adamw_8bit(1e-2, weight_decay=0.3, moments=how)
    core = frugax.optim.scale_by_adam_8bit(moments=how)
    whole = optax.adamw(1e-2, weight_decay=0.3)

    @jax.jit
    def first_steps(tree):
        gradient = jax.tree.map(jnp.cos, tree)
        return [opt.update(gradient, opt.init(tree), tree)[0] for opt in (tx, core, whole)]

    got, direction, exact = first_steps(tree)
    want = jax.tree.map(
        lambda u, p: -1e-2 * (np.asarray(u, float) + 0.3 * np.asarray(p, float)), direction, tree
    )
    assert_close(got, want, "float32")
    assert_close(got["bias"], exact["bias"], "float32")  # too small for 8 bits
    assert_close(got["matrix"], exact["matrix"], "float32")  # a first step reads no stored moment


def test_adafactor_is_optax_adafactor_but_for_rounding():
    """Its momentum is exact after a step from zero, and within an 8-bit code's error after twenty."""
    tree = {"w": params()["matrix"]}
    ours = frugax.optim.adafactor_8bit(1e-2, momentum=0.9)
    theirs = optax.adafactor(1e-2, momentum=0.9, min_dim_size_to_factor=128)
    states = [tx.init(tree) for tx in (ours, theirs)]
    steps = [jax.jit(tx.update) for tx in (ours, theirs)]
    for t in range(20):
        gradient = {"w": jnp.cos(tree["w"] * (t + 1))}
        both = [step(gradient, state, tree) for step, state in zip(steps, states, strict=True)]
        updates, states = [u for u, _ in both], [s for _, s in both]
        got, want = (np.asarray(u["w"], np.float64) for u in updates)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        # A value of the top decade is off by 0.7 % of the largest at most, of lower ones by more of itself; a
        # tenth of the error is forgotten at each step: a few in a hundred.
        assert error < (1e-5 if t == 0 else 0.05)


@dear("adafactor_8bit", "adamw_8bit", "lion_8bit", "sgdm_8bit")
def test_a_thousand_steps_in_one_trace_converge(name):
    tx, step, traces = compiled(name)
    tree = params()
    state, first = jax.jit(tx.init)(tree), float(loss_of(tree))
    for _ in range(1000):
        tree, state = step(tree, state)
    assert float(loss_of(tree)) < 0.02 * first
    assert len(traces) == 1


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_and_shapes_are_kept(name):
    tx, tree = optimizer(name), params(jnp.bfloat16)
    state = jax.eval_shape(tx.init, tree)
    updates, after = jax.eval_shape(tx.update, tree, state, tree)
    avals = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert avals(updates) == avals(tree)
    assert avals(after) == avals(state)
    codes = [x for x in jax.tree.leaves(state) if x.dtype in (jnp.int8, jnp.uint8)]
    assert {x.shape for x in codes} == {(16, 512), (2, 20, 300)}


@dear("adafactor_8bit", "adamw_8bit")
def test_wrappers(name):
    """inject_hyperparams (a traced rate), masked, multi_transform and MultiSteps change nothing else."""
    rate = RATE.get(name, 1e-2)
    tree = {n: x for n, x in params().items() if n != "stack"}
    wrapped = {
        "plain": optimizer(name),
        "inject_hyperparams": optax.inject_hyperparams(MAKE[name])(learning_rate=rate),
        "masked": optax.masked(optimizer(name), {"matrix": True, "bias": False}),
        "multi_transform": optax.multi_transform(
            {"a": optimizer(name), "b": optax.sgd(rate)}, {"matrix": "a", "bias": "b"}
        ),
        "MultiSteps": optax.MultiSteps(optimizer(name), 2),
    }

    @jax.jit
    def run(states, gradient):
        done = {}
        for wrapper, tx in wrapped.items():
            updates, states[wrapper] = tx.update(gradient, states[wrapper], tree)
            done[wrapper] = updates["matrix"]
        return done, states

    states = jax.jit(lambda tree: {wrapper: tx.init(tree) for wrapper, tx in wrapped.items()})(tree)
    for _ in range(2):
        first, states = run(states, tree)
        second, states = run(states, tree)
    for wrapper in ("inject_hyperparams", "masked", "multi_transform"):
        # A traced hyperparameter is a float32: 1 - 0.999 has four digits of it.
        assert_close(second[wrapper], second["plain"], "float32", times=10, name=wrapper)
    assert not np.asarray(first["MultiSteps"]).any()
    assert np.asarray(second["MultiSteps"]).any()


@pytest.mark.nan
@dear("adafactor_8bit", "adamw_8bit")
def test_nan_gradients_leave_the_state_alone(name):
    tx = optax.apply_if_finite(optimizer(name), 3)
    tree = params()
    state = tx.init(tree)
    gradient = {**tree, "matrix": tree["matrix"].at[0, 0].set(jnp.nan)}
    updates, after = jax.jit(tx.update)(gradient, state, tree)
    assert not np.asarray(updates["matrix"]).any()
    for a, b in zip(jax.tree.leaves(after.inner_state), jax.tree.leaves(state.inner_state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stack_is_its_slices():
    tx = frugax.optim.adamw_8bit(1e-2, moments=EightBit(min_size=0))
    stack = params()["stack"]
    step = jax.jit(tx.update)

    def two_steps(x):
        state = tx.init(x)
        for gain in (1, 3):
            updates, state = step(jnp.sin(gain * x), state, x)
        return updates, state[0].moments

    whole, parts = two_steps(stack), [two_steps(x) for x in stack]
    for got, *wanted in zip(*map(jax.tree.leaves, (whole, *parts)), strict=True):
        np.testing.assert_array_equal(got, np.stack(wanted))


def test_an_interrupted_run_goes_on_through_a_checkpoint(tmp_path):
    """Orbax: three steps, a round trip, three more, as six at once. Adam's state is AdamW's."""
    saved, whole = {}, {}
    names = [name for name in NAMES if name != "adam_8bit"]
    for name in names:
        tx, step, _ = compiled(name)
        tree = params()
        state = jax.jit(tx.init)(tree)
        for i in range(6):
            tree, state = step(tree, state)
            if i == 2:
                saved[name] = {"tree": tree, "state": state}
        whole[name] = tree
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "three", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "three", jax.eval_shape(lambda: saved))
    for name in names:
        tree, state = restored[name]["tree"], restored[name]["state"]
        for _ in range(3):
            tree, state = compiled(name)[1](tree, state)
        chex.assert_trees_all_equal(tree, whole[name])


def test_state_bytes_follow_the_formula():
    """n bytes a moment, 4 for each group of a row, 8 a number for small or protected leaves, 4 of count."""
    tree = {"a": jnp.zeros((64, 1000)), "embedding": jnp.zeros((100, 64)), "bias": jnp.zeros(64)}
    for group_size in (256, 2048):
        how = EightBit(group_size=group_size, full_precision=frugax.optim.is_embedding)
        state = jax.eval_shape(frugax.optim.scale_by_adam_8bit(moments=how).init, tree)
        matrix = 2 * (64 * 1000 + 4 * 64 * -(-1000 // group_size))
        assert state_bytes(state) == 4 + matrix + 8 * (6400 + 64)
    llama = {"w": jax.ShapeDtypeStruct((4096, 11008), jnp.float32)}
    state = jax.eval_shape(frugax.optim.adamw_8bit(1e-3).init, llama)
    assert state_bytes(state) / (4096 * 11008) < 2.04
    paper = jax.eval_shape(
        frugax.optim.adamw_8bit(1e-3, moments=EightBit(group_size=2048)).init,
        {"w": jax.ShapeDtypeStruct((4096, 8192), jnp.float32)},
    )
    assert round(state_bytes(paper) / (4096 * 8192), 3) == 2.004


def test_a_step_needs_little_more_than_the_gradient():
    """Temporaries of a whole step on a 64 MB leaf: the gradient, which the update replaces, and a chunk."""
    p = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    tx = frugax.optim.adamw_8bit(1e-3)

    def step(p, state):
        updates, state = tx.update(jax.grad(lambda p: jnp.sum(p["w"] ** 4))(p), state, p)
        return optax.apply_updates(p, updates), state

    f = jax.jit(step, donate_argnums=(0, 1))
    compiled = f.lower(p, jax.eval_shape(tx.init, p)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20 + 6 * 4 * CHUNK


def test_blocks_keep_what_one_scale_loses():
    """Gradients from 1e-4 to 1: 8-bit dynamic blocks follow Adam; int8 with a scale a row does not."""
    rng = np.random.default_rng(0)
    size = np.sort(10 ** rng.uniform(-4, 0, (8, 1024)), axis=1)
    goal = jnp.asarray(rng.standard_normal((8, 1024)), jnp.float32)
    curvature = jnp.asarray(size, jnp.float32)

    def final(tx):
        @jax.jit
        def run():
            def step(carry, _):
                w, state = carry
                updates, state = tx.update(curvature * (w - goal), state, w)
                return (w + updates, state), None

            w = jnp.zeros_like(goal)
            w, _ = jax.lax.scan(step, (w, tx.init(w)), length=300)[0]
            return jnp.sqrt(jnp.mean((w - goal) ** 2))

        return float(run())

    exact = final(optax.adam(1e-2, b2=0.99))
    ours = final(frugax.optim.adam_8bit(1e-2, b2=0.99))
    linear = EightBit(group_size=1024, signed="int8")
    assert abs(ours - exact) < 0.05 * (1 + exact)
    assert final(frugax.optim.adam_8bit(1e-2, b2=0.99, moments=linear)) > 4 * ours


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input():
    with pytest.raises(ValueError, match="group_size: got 0"):
        EightBit(group_size=0)
    with pytest.raises(ValueError, match="signed: got int4"):
        EightBit(signed="int4")
    with pytest.raises(ValueError, match="format: got int8 for a second moment"):
        EightBit(unsigned="int8")
    with pytest.raises(ValueError, match="params: got int32"):
        frugax.optim.adam_8bit(1e-3).init({"w": jnp.zeros(3, jnp.int32)})
    with pytest.raises(ValueError, match="full_precision: matches none of w"):
        frugax.optim.adam_8bit(1e-3, moments=EightBit(full_precision=lambda path: False)).init(
            {"w": jnp.zeros(3)}
        )


@pytest.mark.full
def test_sharded_over_eight_devices():
    run_on_eight_devices("tests.optim.low_bit.eight_bit_sharded")
