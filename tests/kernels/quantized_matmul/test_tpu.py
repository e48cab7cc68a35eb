"""The TPU kernels of quantized_matmul alone: how codes become tiles, several grid steps, bytes, compilers."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from experiments.benchmarks.deviceless_tpu import CHIPS, compile_for, has_libtpu
from experiments.benchmarks.tpu_schedule import hbm_bytes
from frugax.formats import Minifloat, SpecialValue, format_named, quantize
from frugax.kernels.quantized_matmul import pallas_tpu, reference
from frugax.kernels.quantized_matmul.inputs import check
from frugax.kernels.quantized_matmul.pallas_tpu.tiles import even_first, exact, line, split
from frugax.kernels.quantized_matmul.tiling import TPUTiling, for_tpu
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS

from .definition import activated, dequantized

ROW = OPERATIONS["quantized_matmul"]


def case(format, group=None, K=512, **more):
    return {"format": format, "group": group, "K": K, "N": 130, "B": 3} | more


def call_of(given):
    """Return a case's checked call, and its arguments."""
    arguments = ROW.arguments(given)
    x, bias = jnp.asarray(arguments["x"]), arguments.get("bias")
    bias = None if bias is None else jnp.asarray(bias)
    return check(x, arguments["w"], bias, arguments.get("activations"), None), arguments


# What a kernel makes of codes: each pair of (bits, what is multiplied), scaled before or after.
KERNELS = [
    case("uint3", 256, dtype="bfloat16"),  # counted: three planes
    case("int8", 384, K=768, dtype="bfloat16"),  # one group ends within a block of codes
    case("nvfp4", 16, K=384),  # blocks of 128 codes
    case("int4", 128, activations="int8", dtype="bfloat16", bias=True),  # int8 codes
    case("bitmod4", 128, dtype="bfloat16"),  # looked up, in tables of each group
    case("uint8", 256, activations="int8"),
    case("bipolar6", 64, dtype="bfloat16"),
    case("int1", 256, dtype="bfloat16"),
    case("int2", 128, activations="int8"),
    case("mxfp8", 32, activations="fp8_e4m3"),
    case("ternary", dtype="bfloat16"),
    case("nf4", 64),
    case("int5", 48),
    case("fp6_e3m2", 8),
    case("bipolar8", 128, activations="bipolar7"),
    case("bfp6", 16, dtype="bfloat16"),
    case("mxfp4", 4, dtype="bfloat16"),
    case("int7", 512, dtype="bfloat16"),
    case("nf4", 256, dtype="bfloat16"),
    case("bitmod3", 256, dtype="bfloat16"),
    case("bitmod4", 64, dtype="bfloat16"),
    case("bitmod3", 96),
    case("olive4", 32, dtype="bfloat16"),
    case("olive8", 256),
]


@pytest.mark.parametrize(
    "given", [*KERNELS[:5], *(pytest.param(c, marks=pytest.mark.full) for c in KERNELS[5:])], ids=str
)
def test_grid_steps_add_up(given):
    """Several steps along tokens, columns and depth give the definition's product and gradient."""
    (call, spec), arguments = call_of(given | {"B": 20, "N": 200})
    assert pallas_tpu.unsupported_reason(call, spec) is None
    dy = np.random.default_rng(0).standard_normal((20, 200)).astype(call.x.dtype)
    small = TPUTiling(16, 128, 256 if given["K"] % 256 == 0 else 128)
    y = jax.jit(partial(pallas_tpu.forward_tiled, spec=spec, tiling=small, interpret=True))(call)
    whole = TPUTiling(16, 128, given["K"])
    backward = partial(pallas_tpu.backward_tiled, spec=spec, tiling=whole, interpret=True)
    dx = jax.jit(backward)(call, jnp.asarray(dy))
    dtype, w = str(call.x.dtype), arguments["w"]
    W = dequantized(w) if w.format.elementwise else np.asarray(w.dequantize(jnp.float32), float)
    if spec.activations is None or spec.activations.name == "int8":
        want = activated(np.asarray(call.x, float), arguments.get("activations")) @ W
        want += np.asarray(arguments.get("bias", 0.0), float)
    else:
        want = reference.forward(call, spec)
    assert_close(y, want, dtype)
    assert_close(dx, dy.astype(float) @ W.T, dtype)


@pytest.mark.full
def test_a_mixture_of_ones_own():
    """Special values that are no bfloat16 numbers; elements of several minifloats are refused."""
    bitmod = format_named("bitmod4")

    def served(*elements, dtype=jnp.bfloat16):
        format = dataclasses.replace(bitmod, name="own", elements=elements)
        w = quantize(jax.random.normal(jax.random.key(0), (256, 70)), format, group_size=128)
        call, spec = check(jax.random.normal(jax.random.key(1), (2, 256), dtype), w, None, None, None)
        return call, spec, w.dequantize()

    base = bitmod.elements[0].base
    for dtype in (jnp.bfloat16, jnp.float32):
        own = (SpecialValue.of(base, value) for value in (-4.7, 5.3, 7.9, -7.1))
        call, spec, W = served(*own, dtype=dtype)
        y = jax.jit(partial(pallas_tpu.forward, spec=spec, interpret=True))(call)
        assert_close(y, np.asarray(call.x, float) @ np.asarray(W, float), str(call.x.dtype))
    call, spec, _ = served(SpecialValue.of(base, 5.0), SpecialValue.of(Minifloat.of(1, 2), 5.0))
    assert "several" in pallas_tpu.unsupported_reason(call, spec)


ELEMENTS = [
    f"{kind}{bits}" for kind, first in (("int", 2), ("uint", 2), ("bipolar", 1)) for bits in range(first, 9)
]


FEW = ["int2", "int8", "uint3", "bipolar1", "bipolar6"]


@pytest.mark.parametrize("names", [FEW, pytest.param(ELEMENTS, marks=pytest.mark.full)], ids=["few", "all"])
def test_values_on_a_line_and_values_that_round(names):
    """Integers lie on a line from their lowest code on; codebooks and minifloats on none."""
    elements = [format_named(name).element for name in (*names, "ternary")]
    firsts = [2 ** (element.bits - 1) if element.lowest < 0 else 0 for element in elements]

    @jax.jit
    def decoded():
        codes = (jnp.arange(2**e.bits) - first for e, first in zip(elements, firsts, strict=True))
        return [e.decode(each) for e, each in zip(elements, codes, strict=True)]

    for element, values in zip(elements, decoded(), strict=True):
        found = line(element)
        np.testing.assert_array_equal(found.gain * np.arange(2**element.bits) + found.start, values)
        assert exact(element)
    for name in ("nf4", "fp4_e2m1", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2"):
        assert line(format_named(name).element) is None
        assert exact(format_named(name).element) == (name != "nf4")


@pytest.mark.nan
def test_parts_add_up_and_even_channels_come_first():
    x = jax.random.normal(jax.random.key(0), (3, 256), "float32")
    parts = split(x, 3)
    for part in parts:
        np.testing.assert_array_equal(part, part.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(sum(np.asarray(part, float) for part in parts), np.asarray(x, float))
    np.testing.assert_array_equal(
        even_first(jnp.arange(256))[jnp.array([0, 1, 64, 128, 192])], [0, 2, 1, 128, 129]
    )


def test_sizes_follow_from_memory():
    """A few tokens: whole depth, few steps. Longer sums go in parts; what never fits is refused."""
    sizes = partial(for_tpu, block=256, bits=4, groups=32, parts=1)
    assert sizes(8, 4096, 4096) == TPUTiling(8, 512, 4096)
    assert sizes(4096, 4096, 4096).tokens == 256
    assert sizes(8, 2**17, 256).depth < 2**17
    assert sizes(8, 2**24, 256, whole=True) is None


def blocks_read(f, *args):
    """Return the bytes of all blocks that f's kernel reads and writes; one that stays is counted once."""
    calls = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                calls.append(equation)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(f)(*args).jaxpr)
    (call,) = calls
    mapping = call.params["grid_mapping"]
    total = 0
    for block in mapping.block_mappings:
        size = np.prod([getattr(n, "block_size", n) or 1 for n in block.block_shape])
        size *= block.array_aval.dtype.itemsize
        at = [
            tuple(
                int(i)
                for i in jax.core.eval_jaxpr(block.index_map_jaxpr.jaxpr, block.index_map_jaxpr.consts, *step)
            )
            for step in np.ndindex(*mapping.grid)
        ]
        total += size * (1 + sum(a != b for a, b in itertools.pairwise(at)))
    return total


@pytest.mark.parametrize("format", ["int4", "uint3", "nvfp4", "mxfp8", "int2"])
def test_memory_traffic_is_that_of_packed_weights(format):
    """At batch 8, all that crosses HBM is within 1.1 of codes, scales and zeros."""
    M, K, N = 8, 4096, 4096
    group = None if format_named(format).group_size else 128
    w = jax.eval_shape(
        lambda W: quantize(W, format, group_size=group), jax.ShapeDtypeStruct((K, N), jnp.float32)
    )
    x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)

    def product(x, w):
        call, spec = check(x, w, None, None, None)
        return pallas_tpu.forward(call, spec, interpret=False)

    packed = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(w))
    assert packed <= blocks_read(product, x, w) <= 1.1 * packed


@pytest.mark.deviceless
@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (the `deviceless` extra)")
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=pytest.mark.full) for chip in CHIPS])
def test_memory_traffic_of_the_whole_program_is_that_of_packed_weights(chip):
    """XLA's operations around the kernel counted too, which lay out x and decode scales of bitmod."""
    for format, group in (("int2", 128), ("int3", 128), ("int4", 32), ("nvfp4", 16), ("bitmod3", 128)):
        w = jax.eval_shape(
            partial(quantize, format=format, group_size=group), jax.ShapeDtypeStruct((4096, 4096), "float32")
        )
        x = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16)
        product = partial(frugax.kernels.quantized_matmul, backend="pallas_tpu")
        found = hbm_bytes(compile_for(chip, product, x, w).as_text())
        packed = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(w))
        assert packed < found < 1.1 * packed, (format, found / packed)


COMPILED = [
    ({"format": "int4", "B": 8, "K": 512, "N": 384, "group": 128, "bias": True}, "bfloat16", None),
    ({"format": "nvfp4", "B": 3, "K": 384, "N": 200}, "bfloat16", None),
    ({"format": "uint3", "B": 300, "K": 300, "N": 200, "group": 100}, "float32", None),
    ({"format": "int4", "B": 40, "K": 512, "N": 200, "group": 128, "bias": True}, "bfloat16", "int8"),
    ({"format": "uint8", "B": 3, "K": 512, "N": 200, "group": 384}, "float32", None),
    ({"format": "nf4", "B": 3, "K": 256, "N": 200, "group": 128}, "float32", "fp8_e4m3"),
    ({"format": "bipolar7", "B": 3, "K": 512, "N": 200}, "bfloat16", None),
    ({"format": "mxfp6_e3m2", "B": 3, "K": 256, "N": 200}, "bfloat16", None),
    ({"format": "int1", "B": 3, "K": 256, "N": 200}, "bfloat16", "int8"),
    ({"format": "bfp8", "B": 3, "K": 256, "N": 200}, "bfloat16", "int4"),
    ({"format": "bitmod4", "B": 8, "K": 512, "N": 200, "group": 128}, "bfloat16", None),
    ({"format": "olive4", "B": 8, "K": 512, "N": 200, "group": 128}, "bfloat16", None),
]


@pytest.mark.deviceless
@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (the `deviceless` extra)")
@pytest.mark.parametrize(
    ("chip", "given", "dtype", "activations"),
    [
        pytest.param(chip, *given, marks=[] if (chip, i) in (("v5e", 3), ("tpu7x", 1)) else pytest.mark.full)
        for chip in CHIPS
        for i, given in enumerate(COMPILED)
    ],
)
def test_kernels_compile(chip, given, dtype, activations):
    """Both passes, for what the harness' calls leave out."""
    (call, spec), _ = call_of(given | {"dtype": dtype, "activations": activations})

    def both(call, dy):
        y = pallas_tpu.forward(call, spec, interpret=False)
        return y, pallas_tpu.backward(call, dy, spec, interpret=False)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), call)
    dy = jax.ShapeDtypeStruct((call.x.shape[0], call.codes.shape[1]), call.x.dtype)
    compile_for(chip, both, shapes, dy)
