"""Every optimizer of the family, through the same wrappers, placements and interruptions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax.optim import state_bytes
from frugax.optim.common.matrix_spec import leaf_path
from tests.devices import run_alone, run_on_eight_devices
from tests.errors import assert_close
from tests.optim.optimizers import CASES, is_matrix, language, logits, params

NAMES = sorted(CASES)


def optimizer(name, rate=None):
    return CASES[name].make(CASES[name].rate if rate is None else rate)


@functools.cache
def compiled(name):
    """The optimizer at rate 1, a jitted step that scales its updates, and a list that grows with each trace.

    One program for all tests of an optimizer: most of their time is compilation. The state is donated.
    """
    traces = []
    opt = optimizer(name, 1.0)
    opt = opt._replace(init=jax.jit(opt.init))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(tree, state, gradient, rate):
        traces.append(1)
        updates, state = opt.update(gradient, state, tree)
        return jax.tree.map(lambda w, u: w + rate * u, tree, updates), state

    return opt, step, traces


@jax.jit
def towards_one(tree):
    """The gradient of half the squared distance."""
    return jax.tree.map(lambda w: w - 1, tree)


def distance(tree):
    return sum(np.sum((np.asarray(w) - 1) ** 2) for w in jax.tree.leaves(tree))


@jax.jit
def sines(tree, scale=1.0):
    """A gradient that isn't zero anywhere."""
    return jax.tree.map(lambda w: scale * jnp.sin(3 * w), tree)


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_steps_in_one_trace_converge(name):
    opt, step, traces = compiled(name)
    tree = params()
    state = opt.init(tree)
    first = distance(tree)
    for i in range(1000):
        tree, state = step(tree, state, towards_one(tree), CASES[name].rate * (1 - i / 1000))
    assert distance(tree) < 1e-3 * first
    assert len(traces) == 1


@functools.cache
def small_language_model():
    """Its loss and gradient, and the entropies that the loss is to be compared with."""
    text, alone, after_the_last = language()

    def loss(tree):
        scores = logits(tree, text[:-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, text[1:]))

    return jax.jit(jax.value_and_grad(loss)), alone, after_the_last


@pytest.mark.parametrize("name", NAMES)
def test_a_small_language_model_learns(name):
    """In 50 steps half of what the last token tells: from the entropy of tokens to that of pairs."""
    opt, step, _ = compiled(name)
    loss_and_gradient, alone, after_the_last = small_language_model()
    assert alone - after_the_last > 1
    tree = params()
    state = opt.init(tree)
    first, _ = loss_and_gradient(tree)
    assert first > alone
    for _ in range(50):
        tree, state = step(tree, state, loss_and_gradient(tree)[1], 0.03)
    assert loss_and_gradient(tree)[0] < (alone + after_the_last) / 2


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_kept(name):
    opt, tree = optimizer(name), params(jnp.bfloat16)
    state = jax.eval_shape(opt.init, tree)
    updates, after = jax.eval_shape(opt.update, tree, state, tree)
    avals = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert avals(updates) == avals(tree)
    assert avals(after) == avals(state)
    assert not any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state))
    with jax.enable_x64(True):
        assert avals(jax.eval_shape(opt.init, tree)) == avals(state)
        updates, after = jax.eval_shape(opt.update, tree, state, tree)
        assert (avals(updates), avals(after)) == (avals(tree), avals(state))


@pytest.mark.parametrize("name", NAMES)
def test_state_bytes_follow_the_formula(name):
    tree, case = params(), CASES[name]
    leaves = [(leaf_path(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    of = is_matrix if case.stacks else lambda path: path.startswith("layers")
    expected = case.shared + sum(case.bytes_of(shape, of(path)) for path, shape in leaves)
    assert state_bytes(compiled(name)[0].init(tree)) == expected
    assert state_bytes(jax.eval_shape(optimizer(name).init, tree)) == expected


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_with_64_bits(name):
    """Under `jax_enable_x64` float32 params take the same steps, and float64 ones keep float64."""
    opt, tree = optimizer(name), params()

    def steps(tree):
        step, state = jax.jit(opt.update), jax.jit(opt.init)(tree)
        for _ in range(4):
            updates, state = step(jax.tree.map(lambda w: jnp.sin(3 * w), tree), state, tree)
            tree = jax.tree.map(jnp.add, tree, updates)
        return tree

    expected = steps(tree)
    with jax.enable_x64(True):
        test_state_bytes_follow_the_formula(name)
        codes = 10 if name in ("q_galore", "dct_adamw_feedback") else 1  # some are rounded the other way
        assert_close(steps(tree), expected, "float32", times=codes * (1 + 6 * CASES[name].rate) ** 9)
        wide = steps(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree))
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float64")}


WRAPPED = ("galore", "lion", "lisa", "q_galore")  # one of each kind of state


@pytest.mark.nan
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in WRAPPED else [pytest.mark.full]) for n in NAMES]
)
def test_wrappers(name):
    """apply_if_finite, MultiSteps, multi_transform, masked, inject_hyperparams (a traced rate), one in the
    other: two equal gradients are one step; one that is not finite is none, and leaves the state alone."""
    rate, tree = CASES[name].rate, params()
    matrices = jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in leaf_path(path), tree)
    injected = optax.inject_hyperparams(lambda learning_rate: CASES[name].make(learning_rate))
    masked = optax.masked(injected(learning_rate=rate), matrices)
    labels = jax.tree.map(lambda chosen: "a" if chosen else "b", matrices)
    opt = optax.apply_if_finite(
        optax.MultiSteps(optax.multi_transform({"a": masked, "b": optax.sgd(rate)}, labels), 2), 3
    )
    update = jax.jit(opt.update)
    plain, step, _ = compiled(name)
    plain_state, state = plain.init(tree), jax.jit(opt.init)(tree)
    for scale in (1.0, 0.5):
        gradient = sines(tree, scale)
        before, plain_state = step(tree, plain_state, gradient, rate)
        expected = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, tree)
        first, state = update(gradient, state, tree)
        broken = jax.tree.map(lambda w: jnp.asarray(np.full_like(w, np.nan)), tree)
        none, same = update(broken, state, tree)
        assert not any(np.asarray(x).any() for x in jax.tree.leaves((first, none)))
        jax.tree.map(np.testing.assert_array_equal, same.inner_state, state.inner_state)
        second, state = update(gradient, state, tree)
        for leaf in ("layers", "out"):
            assert_close(second[leaf], expected[leaf], "float32", name=leaf)
        assert_close(second["bias"], -rate * np.asarray(gradient["bias"]), "float32")


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].stacks])
def test_a_stack_is_a_loop_over_its_slices(name):
    opt, step, _ = compiled(name)
    rate, tree = CASES[name].rate, params()

    @jax.jit
    def one(gradient, state, w):
        updates, state = opt.update(gradient, state, w)
        return jax.tree.map(lambda w, u: w + rate * u, w, updates), state

    slices = [{"layers": {"kernel": w}} for w in tree["layers"]["kernel"]]
    init = jax.jit(opt.init)
    states, whole, state = [init(w) for w in slices], tree, init(tree)
    for i in range(9):  # past a refresh
        gradient = sines(whole, 1 + i / 8)
        whole, state = step(whole, state, gradient, rate)
        for k in range(len(slices)):
            gradient = sines(slices[k], 1 + i / 8)
            slices[k], states[k] = one(gradient, states[k], slices[k])
    # Nine steps of a map that multiplies errors by up to 1 + 6 rate each.
    loop = np.stack([s["layers"]["kernel"] for s in slices])
    assert_close(whole["layers"]["kernel"], loop, "float32", times=(1 + 6 * rate) ** 9)


@pytest.mark.parametrize("names", ["few", pytest.param("all", marks=pytest.mark.full)])
def test_sharded_over_eight_devices(names):
    run_on_eight_devices("tests.optim.sharded", names)


@pytest.mark.parametrize("name", ["cosmos", "natural_galore"])
def test_on_a_cpu_matrices_of_a_stack_are_factored_one_by_one(name):
    """jaxlib's factorizations of stacks could wait for each other for ever; see `slicewise`."""

    def batches(function, *arguments):
        text = jax.jit(function).lower(*arguments).as_text()
        return re.findall(r'@lapack_[^\n]*num_batch_dims = "(\d)"', text)

    tree = params()
    assert set(batches(optimizer(name).update, tree, optimizer(name).init(tree), tree)) == {"0"}
    assert set(batches(jnp.linalg.qr, tree["layers"]["kernel"])) == {"1"}


@pytest.mark.full
def test_many_stacks_at_once():
    """They do not wait for each other, with the threads that a user has."""
    run_alone("tests.optim.common.stacks_at_once")
