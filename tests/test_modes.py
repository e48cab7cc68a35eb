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
from frugax.formats.named import BY_NAME
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS, parts
from tests.layers.channel.test_moe import ROUTERS, pairs
from tests.layers.mixers.mixers import MIXERS, VARIANTS, make
from tests.optim.optimizers import CASES as OPTIMIZERS

full = pytest.mark.full


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


PARAM_DTYPES = pytest.mark.parametrize("param_dtype", ["float32", pytest.param("bfloat16", marks=full)])


@PARAM_DTYPES
@pytest.mark.parametrize("name", [name for name in MIXERS if name not in VARIANTS])
def test_mixers_trace_under_strict_promotion(name, param_dtype):
    """Value and gradients, packed and with a state, of bfloat16 layers."""
    module = make(name, time=5, dtype=jnp.float32)[0]
    module = module.clone(dtype=jnp.bfloat16, param_dtype=jnp.dtype(param_dtype))
    x, ids = jnp.ones((2, 5, 8), jnp.bfloat16), jnp.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
    with strict():
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        _, state = jax.eval_shape(module.apply, variables, x)

        def loss(variables, x, state):
            y, _ = module.apply(variables, x, state=state, segment_ids=ids)
            return jnp.sum(y.astype(jnp.float32))

        jax.eval_shape(jax.grad(loss, (0, 1)), variables, x, state)


@PARAM_DTYPES
def test_decoders_trace_under_strict_promotion(param_dtype):
    """Tied bfloat16 layers of two kinds, with remat, documents and padded rows."""
    blocks = (frugax.layers.Block("RWKV6", "RWKVChannel", {"heads": 2}), frugax.layers.Block("Mamba", "MLP"))
    model = frugax.layers.Decoder(
        11, 8, blocks, 2, remat=True, dtype=jnp.bfloat16, param_dtype=jnp.dtype(param_dtype)
    )
    tokens, ids = jnp.ones((2, 5), jnp.int32), jnp.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
    how = {"segment_ids": ids, "lengths": jnp.array([5, 3])}
    with strict():
        variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
        _, state = jax.eval_shape(model.apply, variables, tokens)
        jax.eval_shape(jax.grad(lambda v, s: jnp.sum(model.apply(v, tokens, s, **how)[0])), variables, state)


def trace(module, x, **call):
    """Trace a layer's start, its value and the gradients of all its parameters."""

    def gradients(x):
        keys = {"params": jax.random.key(0), "router": jax.random.key(1)}
        variables = module.init(keys, x, **call)

        def loss(params):
            given = variables | {"params": params}
            out, _ = module.apply(given, x, **call, mutable=["moe"], rngs={"router": keys["router"]})
            floats = [y for y in jax.tree.leaves(out) if jnp.issubdtype(y.dtype, jnp.floating)]
            return sum((jnp.sum(y.astype(jnp.float32)) for y in floats), jnp.float32(0))

        return jax.grad(loss)(variables["params"])

    with strict():
        jax.eval_shape(gradients, x)


IDS, LENGTHS = jnp.zeros((2, 6), jnp.int32), jnp.array([6, 4])
MIXTURE = {"experts": 4, "k": 2, "expand": 1, "shared_expand": 0.5, "jitter": 0.1}
# Name -> (class, its attributes, arguments of the call)
CHANNELS = {
    "GLU": (frugax.layers.GLU, {}, {}),
    "ternary MLP": (frugax.layers.MLP, {"ternary": True}, {}),
    "MemoryGLU": (frugax.layers.MemoryGLU, {}, {}),
    "RWKVChannel": (frugax.layers.RWKVChannel, {}, {}),
    "BitLinear": (frugax.layers.BitLinear, {"features": 8}, {}),
    "ternary MoE": (frugax.layers.MoE, MIXTURE | {"ternary": True}, {"lengths": LENGTHS}),
    "tasks": (frugax.layers.MoE, MIXTURE | {"tasks": 2}, {"task": 1}),
}
for router, arguments in ROUTERS.items():
    attributes = MIXTURE | {"router": router, "router_args": pairs(arguments)}
    CHANNELS[router] = frugax.layers.MoE, attributes, {"lengths": LENGTHS, "token_ids": IDS}
for dispatch in ("gather", "einsum", "dense"):
    CHANNELS[dispatch] = frugax.layers.MoE, MIXTURE | {"dispatch": dispatch}, {"lengths": LENGTHS}


def by_default(names, *kept) -> list:
    """Return names as parameters, all but those kept for the full tier."""
    return [pytest.param(name, marks=[] if name in kept else full) for name in names]


@PARAM_DTYPES
@pytest.mark.parametrize("name", by_default(CHANNELS, "RWKVChannel", "gather"))
def test_channel_mixers_trace_under_strict_promotion(name, param_dtype):
    make, attributes, call = CHANNELS[name]
    module = make(**attributes, dtype=jnp.bfloat16, param_dtype=jnp.dtype(param_dtype))
    trace(module, jnp.ones((2, 6, 8), jnp.bfloat16), **call)


@full
def test_a_router_ahead_traces_under_strict_promotion():
    trace(frugax.layers.DecoupledRouter(10, 4, width=16, heads=2, dtype=jnp.bfloat16), IDS)


VISION = {
    "VSS": frugax.layers.VSS({"state_size": 2}),
    "EVSS": frugax.layers.EVSS({"state_size": 2}),
    "InvertedResidual": frugax.layers.InvertedResidual(8),
    "SqueezeExcite": frugax.layers.SqueezeExcite(),
}


@pytest.mark.parametrize("name", by_default(VISION, "EVSS"))
def test_vision_blocks_trace_under_strict_promotion(name):
    """Not in bfloat16: flax's own LayerNorm widens it implicitly."""
    trace(VISION[name], jnp.ones((1, 5, 6, 8)))


@pytest.mark.parametrize("name", by_default(BY_NAME, "uint3", "nf4", "nvfp4", "olive4", "udynamic8"))
def test_formats_trace_under_strict_promotion(name):
    """Packed and unpacked in bfloat16, multiplied by it, and the product's gradient."""

    def results(w, x):
        q = frugax.formats.quantize(w, name)
        y, pull = jax.vjp(lambda x: frugax.kernels.quantized_matmul(x, q), x)
        return q.dequantize(jnp.bfloat16), q.dequantize(jnp.float32), pull(y)

    with strict():
        jax.eval_shape(results, jnp.ones((64, 24), jnp.bfloat16), jnp.ones((3, 64), jnp.bfloat16))


@PARAM_DTYPES
def test_adapters_trace_under_strict_promotion(param_dtype):
    model = frugax.layers.Decoder(
        *(11, 8, (frugax.layers.Block("Mamba", "GLU"),), 2),
        dtype=jnp.bfloat16,
        param_dtype=jnp.dtype(param_dtype),
    )

    def gradients(tokens):
        variables = model.init(jax.random.key(0), tokens)
        params = variables["params"]
        adapters = frugax.peft.lora_init(jax.random.key(1), params, targets=("in_gate", "gate_in"), rank=2)

        def loss(adapters):
            return jnp.sum(frugax.peft.lora_apply(model, variables, adapters, tokens)[0].astype(jnp.float32))

        merged = frugax.peft.lora_merge(params, adapters)
        return jax.grad(loss)(adapters), frugax.peft.lora_unmerge(merged, adapters)

    with strict():
        jax.eval_shape(gradients, jnp.ones((2, 5), jnp.int32))


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
        marks = [] if row.name == "causal_conv1d" else full
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
# Programs compiled for chips that are not here.
COMPILED = ["kernels", "memory", "parallel", "planner"]
# What is in no mode: examples print what JAX's own defaults make; the rest reads files, and calls no JAX.
LEFT_OUT = {
    f"test_{name}.py" for name in ("colab", "modes", "package", "papers", "readme", "recipes", "tiers")
}
TESTS = Path(__file__).parent


def run_tests(marks: str, settings: dict[str, str], paths: list[str]) -> None:
    """Run tests in a process of their own."""
    files = [str(TESTS / path) for path in paths]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", marks, *files]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]


@full
@pytest.mark.parametrize("folders", FOLDERS)
def test_the_default_tier_passes_in_all_modes(folders):
    run_tests("not full and not nan and not deviceless", ALL, folders.split())


@full
def test_kernels_compile_for_their_chips_in_all_modes():
    run_tests("not full and deviceless", ALL, COMPILED)


@full
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
    return [pytest.param(n, marks=[] if n == name else full) for n in OPERATIONS]


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


@full
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


@full
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
