"""Every optimizer on params in the containers of Linen, nnx, Haiku and Equinox, as with `optax.adamw`.

Five steps in which the loss falls, with params and state donated; after two of them a way through Orbax and
`flax.serialization`, from where the other three go on to the same bits; `tree_map_params` over the state.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization

from frugax import optim
from tests.optim.containers import CONTAINERS, NnxModel
from tests.optim.optimizers import CASES

EIGHT_BIT = optim.EightBit(min_size=1)
OPTIMIZERS = {name: case.make for name, case in CASES.items()} | {
    "adam_8bit": lambda rate: optim.adam_8bit(rate, moments=EIGHT_BIT),
    "adamw_8bit": lambda rate: optim.adamw_8bit(rate, moments=EIGHT_BIT),
    "lion_8bit": lambda rate: optim.lion_8bit(rate, moments=EIGHT_BIT),
    "sgdm_8bit": lambda rate: optim.sgdm_8bit(rate, moments=EIGHT_BIT),
    "adafactor_8bit": lambda rate: optim.adafactor_8bit(rate, moments=EIGHT_BIT),
    "lion_k": lambda rate: optim.lion_k(rate, "l2", weight_decay=0.0),
    "slimfit": lambda rate: optim.slimfit(optax.adam(rate), 0.5),
    "slimfit_together": lambda rate: optim.slimfit(optax.adam(rate), 0.5, together=True),
    "quantized_state": lambda rate: optim.quantized_state(
        optax.adam(rate), {"mu": "dynamic8", "nu": "udynamic8"}, min_size=1
    ),
    "scale_by_fisher": lambda rate: optax.chain(
        optax.masked(optim.scale_by_fisher(3, damping=1.0), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        optax.scale(-rate),
    ),
    "adamw": optax.adamw,
}
COVER = {  # each container, and each kind of state
    ("linen", "dct_adamw_feedback"),
    ("boxed", "q_galore"),
    ("haiku", "adamw_8bit"),
    ("equinox", "lisa"),
    ("plain", "lion"),
    ("nnx", "cosmos"),
    ("nnx", "adafactor_8bit"),
}


def table():
    for container in (*CONTAINERS, "nnx"):
        for name in OPTIMIZERS:
            marks = [] if (container, name) in COVER else [pytest.mark.full]
            yield pytest.param(container, name, marks=marks)


@pytest.mark.parametrize(("container", "name"), list(table()))
def test_as_with_adamw(container, name, tmp_path):
    run = run_nnx if container == "nnx" else run_optax
    run(OPTIMIZERS[name](0.03), container, tmp_path)


def run_optax(opt, container, folder):
    params, loss = CONTAINERS[container]()

    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = opt.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    state = check_mapped(opt, params, has_dicts=container in ("linen", "plain", "haiku"))

    def steps(saved, count):
        losses = []
        for _ in range(count):
            *saved, value = step(*saved)
            losses.append(float(value))
        return saved, losses

    two, first = steps((params, state), 2)
    kept = jax.tree.map(np.asarray, two)
    five, last = steps(two, 3)
    check_fall(first + last)
    for restored in (through_orbax(kept, folder), through_bytes(kept)):
        again, _ = steps(jax.tree.map(jnp.asarray, restored), 3)
        jax.tree.map(np.testing.assert_array_equal, again, five)


def run_nnx(opt, container, folder):
    model = NnxModel()
    optimizer = nnx.Optimizer(model, opt, wrt=nnx.Param)
    check_mapped(opt, nnx.state(model, nnx.Param))

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer):
        value, gradient = nnx.value_and_grad(lambda model: model.loss())(model)
        optimizer.update(model, gradient)
        return value

    first = [float(step(model, optimizer)) for _ in range(2)]
    both = nnx.state((model, optimizer))
    kept = jax.tree.map(np.asarray, nnx.to_pure_dict(both))
    last = [float(step(model, optimizer)) for _ in range(3)]
    check_fall(first + last)
    five = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state((model, optimizer))))
    for restored in (through_orbax(kept, folder), through_bytes(kept)):
        nnx.replace_by_pure_dict(both, jax.tree.map(jnp.asarray, restored))
        nnx.update((model, optimizer), both)
        assert [float(step(model, optimizer)) for _ in range(3)] == last
        again = nnx.to_pure_dict(nnx.state((model, optimizer)))
        jax.tree.map(np.testing.assert_array_equal, again, five)


def check_fall(losses):
    assert losses[-1] < 0.95 * losses[0], losses


def check_mapped(opt, params, *, has_dicts=False):
    """A fresh state. `tree_map_params` reaches moments, and pairs a leaf's state with what is the leaf's."""
    state = jax.jit(opt.init)(params)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    more = optax.tree_utils.tree_map_params(opt, lambda x: np.asarray(x) + np.ones((), x.dtype), state)
    assert shapes(more) == shapes(state)
    differ = lambda a, b: (np.asarray(a) != np.asarray(b)).any()  # noqa: E731
    changed = jax.tree.leaves(jax.tree.map(differ, more, state))
    assert any(changed)
    if has_dicts:
        paths = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
        seen = []
        optax.tree_utils.tree_map_params(
            opt, lambda x, path: seen.append(path), state, paths, is_leaf=lambda x: not isinstance(x, dict)
        )
        assert set(seen) == set(jax.tree.leaves(paths))
    return state


def through_orbax(saved, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "saved", jax.tree.map(np.zeros_like, saved))


def through_bytes(saved):
    """Equinox's modules are unknown to `flax.serialization`, also with `optax.adamw`: as a list of arrays."""
    leaves, tree = jax.tree.flatten(saved)
    try:
        written = serialization.to_bytes(saved)
    except TypeError:
        return tree.unflatten(serialization.from_bytes(leaves, serialization.to_bytes(leaves)))
    return serialization.from_bytes(jax.tree.map(np.zeros_like, saved), written)


def test_boxes_add_no_name_to_a_path():
    """A leaf that is to stay in float32 by its path does so in a box too."""
    how = optim.EightBit(min_size=0, full_precision=optim.is_embedding)
    for box in (nnx.Param, lambda x: nn.Partitioned(x, (None, "model"))):
        params = {"embedding": box(jnp.ones((4, 8))), "kernel": box(jnp.ones((4, 8)))}
        state = jax.eval_shape(optim.scale_by_adam_8bit(moments=how).init, params)
        dtypes = [x.dtype for x in jax.tree.leaves(state.moments[0])]
        assert dtypes == [jnp.float32, jnp.int8, jnp.float32]  # the embedding; the kernel's codes and scales


def test_no_array_stands_twice_in_a_fresh_state():
    """Nor is one of the params': so that a state is donated by itself, made by `jax.jit` or without."""
    params, _ = CONTAINERS["plain"]()
    for name, make in OPTIMIZERS.items():
        made = jax.make_jaxpr(make(0.03).init)(params).jaxpr
        arrays = [x for x in made.outvars if not hasattr(x, "val")]  # a literal is made anew
        assert len(arrays) == len(set(arrays)), name
        assert not {*made.invars} & {*arrays}, name
