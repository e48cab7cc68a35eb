"""Every operation on every backend against its definition in float64: values, gradients, states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import assert_close, bound

from .harness import OPERATIONS, every_case, expected, narrowest, over, parts, run, value_and_gradients

DIFFERENTIABLE = over(lambda row: row.check is None)


def with_entries(tree):
    """Return the leaves that hold any number: a filter of one tap has an empty state."""
    return [x for x in jax.tree.leaves(tree) if np.size(x)]


@pytest.mark.parametrize(("operation", "backend", "case"), every_case())
def test_values_and_gradients(operation, backend, case):
    row = OPERATIONS[operation]
    arguments = row.arguments(case)
    if row.check is not None:
        row.check(arguments, run(row, arguments, backend), name=f"{backend} {case}")
        return
    ids = arguments.get("segment_ids")
    everything = None if ids is None else np.ones(ids.shape, np.float32)
    with jax.enable_x64(case.get("dtype") == "float64"):
        results, gradients = value_and_gradients(row, arguments, backend, everything)
    check_dtypes(row, arguments, results, gradients)
    dtype = narrowest(arguments)
    (want, *want_states), want_gradients = expected(row, case)
    out, *states = results
    assert jax.tree.map(np.shape, results) == jax.tree.map(np.shape, (want, *want_states))
    times = row.narrow if dtype.itemsize == 2 else 1
    assert_close(out, want, dtype, times=times, name="output")
    state_dtype = "float32" if row.exact_state and dtype.itemsize == 2 else dtype
    assert_close(with_entries(states), with_entries(want_states), state_dtype, times=times, name="state")
    some = {n: g for n, g in gradients.items() if with_entries(g)}
    assert_close(some, {n: want_gradients[n] for n in some}, dtype, times=times, name="d")
    if ids is not None and not {"lengths", "segment_states"} & set(arguments):
        with jax.enable_x64(case.get("dtype") == "float64"):
            no_gradient_leaves_the_last_document(row, arguments, backend)


def check_dtypes(row, arguments, results, gradients):
    """The output has one argument's dtype, each gradient its own argument's, states a wide one."""
    floats, *_ = parts(arguments)
    wide = jnp.float64 if any(x.dtype == jnp.float64 for x in jax.tree.leaves(floats)) else jnp.float32
    out, *states = results
    assert out.dtype == floats[row.like].dtype
    states = jax.tree.leaves(states)
    assert [x.dtype for x in states] == [wide if n is None else floats[n].dtype for n in row.states]
    assert jax.tree.map(lambda g: g.dtype, gradients) == jax.tree.map(lambda x: x.dtype, floats)


def no_gradient_leaves_the_last_document(row, arguments, backend):
    """The last document's outputs and state say nothing about other documents, but for rounding."""
    ids = arguments["segment_ids"]
    backwards = arguments.get("reverse", False)
    read = ids[:, ::-1] if backwards else ids
    changes = np.cumsum(read[:, 1:] != read[:, :-1], axis=1)
    document = np.concatenate([np.zeros_like(changes[:, :1], shape=(len(ids), 1)), changes], axis=1)
    last = document == document[:, -1:]
    last, alone = (last[:, ::-1] if backwards else last), document[:, -1] == 0
    _, gradients = value_and_gradients(row, arguments, backend, last.astype(np.float32))
    for name, gradient in gradients.items():
        if name == "initial_state":
            assert all(not np.asarray(g)[~alone].any() for g in jax.tree.leaves(gradient)), name
        elif row.axes_of(name, arguments).startswith("b t"):
            rounding = bound("float32") * abs(gradient).max() if name in row.summed else 0
            assert (abs(np.asarray(gradient, np.float64)[~last]) <= rounding).all(), name


@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_the_reference_is_the_definition(operation):
    """Values, and the slope along a random direction of every argument, by complex steps."""
    row = OPERATIONS[operation]
    for case in (row.small, *row.defined):
        arguments = row.arguments(case | {"dtype": "float64"})
        with jax.enable_x64(True):
            results, gradients = jax.tree.map(np.asarray, value_and_gradients(row, arguments, row.reference))
        floats, *_ = parts(arguments)

        def define(arguments, row=row):
            return jax.tree.leaves(row.definition(**arguments))

        assert_close(with_entries(results), with_entries(define(arguments)), "float64", name=str(case))
        rng = np.random.default_rng(7)
        weights = [rng.standard_normal(x.shape).astype(jnp.bfloat16) for x in jax.tree.leaves(results)]
        for name, x in floats.items():
            way = jax.tree.map(lambda x, rng=rng: rng.standard_normal(x.shape), x)
            moved = jax.tree.map(lambda x, w: x + 1e-100j * w, x, way)
            found = define(arguments | {name: moved})
            slope = (
                sum(np.sum(r.imag * w.astype(float)) for r, w in zip(found, weights, strict=True)) / 1e-100
            )
            got = sum(map(np.vdot, jax.tree.leaves(gradients[name]), jax.tree.leaves(way)))
            # A slope may be small by chance; the gradient's length is its scale.
            size = sum(np.linalg.norm(g) for g in jax.tree.leaves(gradients[name]))
            assert abs(slope - got) <= 1e-11 * size, (name, case)


def carried() -> list:
    """Return (operation, backend): by default what runs on a CPU."""
    return [
        pytest.param(row.name, backend, marks=[] if backend is None else pytest.mark.full)
        for row in OPERATIONS.values()
        if "initial_state" in row.axes
        for backend in row.cases
    ]


@pytest.mark.parametrize(("operation", "backend"), carried())
def test_tokens_one_by_one_equal_packed_rows(operation, backend):
    """One call for each token, which carries the state, and starts afresh where a row's document ends."""
    row = OPERATIONS[operation]
    arguments = row.arguments(row.small_on(backend) | {"T": 9 if backend == "pallas_gpu" else 70})
    whole = run(row, arguments, backend)
    state, ids = arguments.pop("initial_state"), arguments.pop("segment_ids", None)
    tokens = [n for n in row.axes if n in arguments and row.axes_of(n, arguments).startswith("b t")]
    T = arguments[tokens[0]].shape[1]
    order = range(T - 1, -1, -1) if arguments.get("reverse") else range(T)
    outputs, before = {}, order[0]
    for t in order:
        if ids is not None:
            new = ids[:, t] != ids[:, before]
            state = jax.tree.map(lambda x, new=new: np.where(expand(new, x), 0, x), state)
        token = {n: arguments[n][:, t : t + 1] for n in tokens}
        out, *states = run(row, arguments | token | {"initial_state": state}, backend)
        (state,), outputs[t], before = states, np.asarray(out), t
    joined = np.concatenate([outputs[t] for t in range(T)], axis=1)
    assert_close((joined, state), whole, narrowest(arguments))


def expand(rows, x):
    """Return rows [B] with as many axes as x."""
    return rows.reshape(-1, *[1] * (x.ndim - 1))
