"""Run by test_cover.py on eight devices: a mixer, a form of parallelism and an optimizer in one step."""

import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import frugax
from experiments.trainer.parallel import make_layout
from experiments.trainer.runs import build_step
from experiments.trainer.state import init_state
from tests.errors import bound, error
from tests.parallel.steps import config_of

optim = frugax.optim
ROWS, TIME, VOCAB, WIDTH = 8, 16, 32, 32
EPS = float(jnp.finfo(jnp.float32).eps)

# A word more here is a word more in the cover. "experts" has a mixture of experts in place of the GLU.
FORMS: dict[str, dict[str, int]] = {
    "data": dict(data=8),
    "zero 1": dict(fsdp=8, zero=1),
    "zero 2": dict(fsdp=8, zero=2),
    "zero 3": dict(fsdp=8, zero=3),
    "tensor": dict(data=4, tensor=2),
    "zero 3 x tensor": dict(data=2, fsdp=2, tensor=2, zero=3),
    "experts": dict(data=2, expert=4),
    "slice x data": dict(slice=2, data=4),
    "sequence": dict(data=2, sequence=4),
    "sequence x zero 3": dict(fsdp=4, sequence=2, zero=3),
    "pipeline": dict(pipeline=2, data=2, tensor=2),
    "pipeline x experts": dict(pipeline=2, fsdp=2, expert=2),
    "pipeline x sequence x zero 3": dict(pipeline=2, fsdp=2, sequence=2, zero=3),
}
PARTS = 2  # of a batch, in a pipeline
MIXERS: dict[str, dict[str, object]] = {
    "LinearAttention": {"heads": 2},
    "LightningAttention": {"heads": 2},
    "Retention": {"heads": 2},
    "GatedLinearAttention": {"heads": 2},
    "HGRN2": {"heads": 2},
    "RWKV5": {"heads": 2},
    "RWKV6": {"heads": 2, "mix_rank": 4, "decay_rank": 4},
    "MLGRU": {},
    "FlashRNN": {"heads": 2},
    "LMU": {"order": 4, "theta": 6.0, "signals": 2},
    "Mamba": {"state_size": 4},
    "Mamba2": {"heads": 4, "state_size": 4},
    "SlidingWindowAttention": {"heads": 2, "window": 4},
    "GatedConvolution": {"width": 3},
    "Based": {"heads": 2, "key_size": 4, "window": 4},
}


def normal_bound(times):
    return times * bound("float32")


# Each with the error that it may add to an update of equal gradients. Sums over devices come in another
# order; what turns their rounding into more is said.
OPTIMIZERS = {
    "adamw": (lambda: optax.adamw(1e-2), normal_bound(4)),
    "lion": (lambda: optim.lion(1e-2), normal_bound(4)),
    "muon": (lambda: optax.contrib.muon(1e-2), 1e-3),  # iterations whose slope at zero is 3.4 to the fifth
    "galore": (lambda: optim.galore(1e-2, rank=2), 1e-3),  # the subspace of a singular value decomposition
    "apollo": (lambda: optim.apollo(1e-2, rank=2), normal_bound(16)),  # norms of projected channels
    "adam_8bit": (lambda: optim.adam_8bit(1e-2), 5e-3),  # codes on the edge of two
    "q_galore": (lambda: optim.q_galore(1e-2, rank=2), 5e-3),  # both
}


def impossible(mixer: str, form: str) -> bool:
    """Tell if a mixer refuses a form: FlashRNN's state is no affine map of the one before."""
    return mixer == "FlashRNN" and "sequence" in form


def model(mixer: str, form: str) -> frugax.layers.Decoder:
    channel = ("GLU", {"expand": 2.0})
    if "experts" in form:
        channel = ("MoE", {"experts": 8, "k": 2, "expand": 1.0, "expert_axis": "expert"})
    block = frugax.layers.Block(mixer, channel[0], MIXERS[mixer], channel[1])
    return frugax.layers.Decoder(VOCAB, WIDTH, (block,), repeats=2, tie_embeddings=False, backend="xla")


def batch() -> dict[str, np.ndarray]:
    """Rows of two documents and one."""
    tokens = np.random.default_rng(0).integers(VOCAB, size=(ROWS, TIME + 1)).astype(np.int32)
    ids = np.zeros((ROWS, TIME), np.int32)
    ids[::2, 5:] = 1
    ones = np.ones((ROWS, TIME), np.float32)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ids}
    return rows | {"weights": ones, "bytes": ones}


def keep_gradient() -> optax.GradientTransformation:
    """Pass gradients on, and keep the last ones as the state, where they lie as moments do."""
    return optax.GradientTransformation(
        lambda params: {"kept": jax.tree.map(jnp.zeros_like, params)},
        lambda grads, _, params: (grads, {"kept": grads}),
    )


def nudged(unit: float, x: jax.Array) -> jax.Array:
    """A param with its numbers moved by units in their last place, up and down by turns."""
    return jax.device_put(x * (1 + unit * EPS * np.resize((1, -1, -1), x.shape)).astype(x.dtype), x.sharding)


class Step(NamedTuple):
    """The loss, gradients, and params before and after a step."""

    loss: float
    grads: Any
    before: Any
    after: Any


def steps(module, optimizer, *units: float, parts: int = 1, **mesh: int) -> list[Step]:
    """Take the first step, with params that are moved by so many units in their last places."""
    config = config_of(ROWS, accumulate=parts, repeats=module.repeats, **mesh)
    layout = make_layout(config)
    optimizer = optax.chain(keep_gradient(), optimizer)

    def init():
        return init_state(module, optimizer, 0, 0.0)

    train_step = build_step(config, module, optimizer, layout)
    program, found = None, []
    for unit in units:
        state, rows = layout.create(init), layout.batch(batch())
        if unit:
            state = state._replace(params=jax.tree.map(functools.partial(nudged, unit), state.params))
        before = layout.whole(layout.take(state).params)
        program = program or layout.compile(train_step, state, rows)
        state, metrics = program(state, rows)
        state = layout.take(state)
        grads, after = (layout.whole(x) for x in (state.optimizer[0]["kept"], state.params))
        found.append(Step(float(metrics["loss"]), grads, before, after))
    return found


@functools.cache
def one_device(mixer: str, experts: bool, parts: int) -> tuple[Step, list[float]]:
    """The step of one device, and the error that each gradient may have.

    It is 1e-5, or four times what the worse of two other roundings of the params does on one device, where a
    mixer amplifies it.
    """
    one, *others = steps(model(mixer, "experts" if experts else ""), optax.sgd(1.0), 0, 1, -1, parts=parts)
    limits = []
    for b, *moved in zip(*(jax.tree.leaves(step.grads) for step in (one, *others)), strict=True):
        limits.append(max(1e-5, *(4 * error(a, b) for a in moved)) if np.any(b) else 0.0)
    return one, limits


@functools.cache
def alone(mixer: str, experts: bool, optimizer: str):
    """The update of an optimizer on one device, compiled."""
    rule = OPTIMIZERS[optimizer][0]()
    return jax.jit(
        lambda grads, params: optax.apply_updates(params, rule.update(grads, rule.init(params), params)[0])
    )


def main(mixer: str, form: str, optimizer: str) -> None:
    build, limit = OPTIMIZERS[optimizer]
    experts = "experts" in form
    parts = PARTS if "pipeline" in form and experts else 1  # routers balance the tokens of a part
    one, limits = one_device(mixer, experts, parts)
    parts = PARTS if "pipeline" in form else 1
    (found,) = steps(model(mixer, form), build(), 0, parts=parts, **FORMS[form])
    np.testing.assert_allclose(found.loss, one.loss, rtol=1e-5)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(one.grads)]
    grads, wanted = jax.tree.leaves(found.grads), jax.tree.leaves(one.grads)
    for name, got, want, most in zip(names, grads, wanted, limits, strict=True):
        if np.any(want):
            assert error(got, want) < most, (name, error(got, want), most)
        else:  # of what a matrix that starts at zero hides
            assert not np.any(got), name
    # The update alone, of the same gradients: a small difference of gradients is a large one of their signs.
    after = alone(mixer, experts, optimizer)(found.grads, one.before)
    leaves = map(jax.tree.leaves, (found.before, one.before, found.after, after))
    for name, old, same, got, want in zip(names, *leaves, strict=True):
        np.testing.assert_array_equal(old, same)
        moved, wanted = (np.asarray(x, np.float64) - old for x in (got, want))
        if np.any(wanted):  # params have a rounding of their own
            rounding = EPS * np.abs(old).max() / np.abs(wanted).max()
            assert error(moved, wanted) < limit + 2 * rounding, (name, error(moved, wanted))


if __name__ == "__main__":
    main(*sys.argv[1:])
