"""Strict settings of JAX, which users turn on to find their own mistakes, find none of the library's."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS, parts
from tests.layers.mixers.mixers import MIXERS, VARIANTS, make
from tests.optim.optimizers import CASES as OPTIMIZERS


@contextlib.contextmanager
def strict():
    """Raise where JAX would add axes, or widen a dtype, by itself."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_trace_under_strict_promotion(operation):
    """Value and gradients, with all arguments, of the form that a CPU gets; in bfloat16 where it may be."""
    row = OPERATIONS[operation]
    has_gradients = row.check is None
    floats, arrays, static = parts(
        row.arguments(row.small | ({"dtype": "bfloat16"} if has_gradients else {}))
    )
    floats, arrays = jax.tree.map(jnp.asarray, (floats, arrays))

    def results(floats):
        return row.call(
            None if row.choice != "backend" or row.composed else "xla", **floats, **arrays, **static
        )

    def gradients(floats):
        out, pull = jax.vjp(results, floats)
        return pull(out)

    with strict():
        jax.eval_shape(gradients if has_gradients else results, floats)


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in VARIANTS])
def test_mixers_trace_under_strict_promotion(name):
    """Value and gradients, packed and with a state: bfloat16 layers over float32 parameters."""
    module = make(name, time=5, dtype=jnp.float32)[0].clone(dtype=jnp.bfloat16)
    x, ids = jnp.ones((2, 5, 8), jnp.bfloat16), jnp.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
    with strict():
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        _, state = jax.eval_shape(module.apply, variables, x)

        def loss(variables, x, state):
            y, _ = module.apply(variables, x, state=state, segment_ids=ids)
            return jnp.sum(y.astype(jnp.float32))

        jax.eval_shape(jax.grad(loss, (0, 1)), variables, x, state)


def test_decoders_trace_under_strict_promotion():
    """Tied bfloat16 layers of two kinds, with remat, documents and padded rows."""
    blocks = (frugax.layers.Block("RWKV6", "RWKVChannel", {"heads": 2}), frugax.layers.Block("Mamba", "MLP"))
    model = frugax.layers.Decoder(11, 8, blocks, 2, remat=True, dtype=jnp.bfloat16)
    tokens, ids = jnp.ones((2, 5), jnp.int32), jnp.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
    how = {"segment_ids": ids, "lengths": jnp.array([5, 3])}
    with strict():
        variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
        _, state = jax.eval_shape(model.apply, variables, tokens)
        jax.eval_shape(jax.grad(lambda v, s: jnp.sum(model.apply(v, tokens, s, **how)[0])), variables, state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_promote_no_rank(name):
    """Under strict dtype promotion Optax's own bias correction doesn't trace, nor any Adam with it."""
    optimizer = OPTIMIZERS[name].make(1e-2)
    params = {"layers": {"kernel": jnp.ones((3, 8, 12))}, "bias": jnp.ones(12)}
    with jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(optimizer.init, params)
        jax.eval_shape(optimizer.update, params, state, params)


def with_one_wide() -> list:
    """Return (operation, name) for every float of an operation that has kernels; one operation by default."""
    found = []
    for row in (row for row in OPERATIONS.values() if row.choice == "backend" and not row.composed):
        marks = [] if row.name == "causal_conv1d" else pytest.mark.full
        floats = parts(row.arguments(row.small))[0]
        found += [pytest.param(row.name, n, marks=marks) for n, x in floats.items() if hasattr(x, "dtype")]
    return found


@pytest.mark.parametrize(("operation", "name"), with_one_wide())
def test_one_float64_beside_others_lowers_for_tpu(operation, name):
    """Under x64 a user's bias or state may be float64: kernels take none, nor drop its digits unsaid."""
    row = OPERATIONS[operation]
    floats, arrays, static = parts(row.arguments(row.small))
    with jax.enable_x64(True):
        floats |= {name: np.asarray(floats[name], np.float64)}
        floats, arrays = jax.tree.map(jnp.asarray, (floats, arrays))

        def results(floats, backend=None):
            return row.call(backend, **floats, **arrays, **static)

        def gradients(floats):
            out, pull = jax.vjp(results, floats)
            return pull(out)

        try:
            jax.eval_shape(lambda x: results(x, "pallas_tpu"), floats)
            refused = ""
        except ValueError as error:
            refused = str(error)
        if refused and "can't serve" not in refused:  # every backend asks for one dtype
            return
        traced = jax.jit(results if row.check else gradients).trace(floats)
        kernels = "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
        assert kernels == (not refused)
        assert not refused or "float64" in refused


# All at once: each only raises or widens, so what passes under all passes under each. But for numbers of the
# default dtype, which are of 64 bits here: what overflows in float32 alone is seen where tests say float32.
ALL = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_DEBUG_NANS": "1"}
FOLDERS = [
    "formats compress peft quant",
    "moe memory planner models",
    "layers",
    "optim",
    "experiments",
    "parallel kernels/test_bad_input.py kernels/test_causality.py kernels/test_isolation.py "
    "kernels/test_rows.py",
    "kernels/test_operations.py kernels/causal_conv1d kernels/linear_recurrence kernels/lmu kernels/ssd",
    "kernels/test_export.py kernels/test_transformations.py kernels/test_sharding.py "
    "kernels/linear_attention",
    "kernels/common kernels/rnn kernels/selective_scan kernels/selective_scan_2d kernels/quantized_update "
    "kernels/grouped_matmul kernels/quantized_matmul",
]
# What is in no mode: examples print what JAX's own defaults make; the rest reads files, and calls no JAX.
LEFT_OUT = {
    *(f"test_{name}.py" for name in ("colab", "modes", "package", "papers", "readme", "recipes", "tiers")),
}
TESTS = Path(__file__).parent


COMPILED = ["kernels", "memory", "parallel"]  # not planner: the TPU's compiler counts no 64-bit loop


def run_tests(marks: str, settings: dict[str, str], paths: list[str]) -> None:
    """Run tests in a process of their own."""
    files = [str(TESTS / path) for path in paths]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", marks, *files]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.full
@pytest.mark.parametrize("folders", FOLDERS)
def test_the_default_tier_passes_in_all_modes(folders):
    run_tests("not full and not nan and not deviceless", ALL, folders.split())


@pytest.mark.full
def test_kernels_compile_for_their_chips_in_all_modes():
    run_tests("not full and deviceless", ALL, COMPILED)


@pytest.mark.full
def test_tests_with_nan_pass_in_the_other_modes():
    """Tests that feed NaN, that count on donation, and of Hopper's kernels: all but NaN checks."""
    settings = {name: value for name, value in ALL.items() if name != "JAX_DEBUG_NANS"}
    run_tests("not full and nan and not deviceless", settings, " ".join(FOLDERS).split())


def test_modes_leave_no_file_out():
    """A new folder is in a mode, or among those that are left out."""
    paths = {*" ".join(FOLDERS).split(), "kernels/test_deviceless.py", *LEFT_OUT}
    found = [file.relative_to(TESTS) for file in TESTS.rglob("test_*.py")]
    assert not [file for file in found if not paths & {str(x) for x in (file, *file.parents)}]
    assert not [path for path in paths if not (TESTS / path).exists()]


def first(name: str) -> list:
    """Return the operations as parameters, all but one for the full tier: each step is a program."""
    return [pytest.param(n, marks=[] if n == name else pytest.mark.full) for n in OPERATIONS]


@pytest.mark.parametrize("operation", first("linear_recurrence"))
def test_operations_run_without_jit(operation):
    row = OPERATIONS[operation]
    floats, arrays, static = parts(row.arguments(row.small))
    floats, arrays = jax.tree.map(jnp.asarray, (floats, arrays))

    def run(floats):
        def results(floats):
            return row.call(None, **floats, **arrays, **static)

        if row.check is not None:
            return results(floats)
        out, pull = jax.vjp(results, floats)
        return out, pull(out)

    want = jax.jit(run)(floats)
    with jax.disable_jit():
        got = run(floats)
    if row.check is None:
        assert_close(got, want, "float32")


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in MIXERS if name not in VARIANTS])
def test_mixers_run_without_jit(name):
    module, variables, x = make(name, time=3, dtype=jnp.float32)
    ids = jnp.broadcast_to(jnp.array([0, 0, 1]), x.shape[:2])

    def both(variables, x):
        y, pull = jax.vjp(lambda *args: module.apply(*args, segment_ids=ids)[0], variables, x)
        return y, pull(y)

    want = jax.jit(both)(variables, x)
    with jax.disable_jit():
        assert_close(both(variables, x)[0], want[0], "float32")


@pytest.mark.full
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_run_without_jit(name):
    optimizer = OPTIMIZERS[name].make(1e-2)
    kernel = jax.random.normal(jax.random.key(0), (3, 8, 12))
    params = {"layers": {"kernel": kernel}, "bias": jnp.ones(12)}
    want, _ = jax.jit(lambda p: optimizer.update(p, optimizer.init(p), p))(params)
    with jax.disable_jit():
        got, _ = optimizer.update(params, optimizer.init(params), params)
    flat = [jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (got, want)]
    # COSMOS' first basis is that of the first gradient, whose digits its QR step makes into larger ones.
    assert_close(*flat, "float32", times=4 if "cosmos" in name else 1)
