"""Every operation exports once for any batch and, where time is an axis, any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import frugax
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS, over, parts, run
from tests.kernels.harness import structs as structs_of


def exported() -> list:
    """Return the operations: by default those that are made of no others."""
    names = over(lambda row: row.check is None)
    return [pytest.param(n, marks=pytest.mark.full) if OPERATIONS[n].composed else n for n in names]


@pytest.mark.parametrize("operation", exported())
def test_one_program_serves_every_batch_and_length(operation, unchecked_types):
    row = OPERATIONS[operation]
    arguments = row.arguments(row.small)
    floats, arrays, static = parts(arguments)
    scope = export.SymbolicScope()
    # The tokens of an image's paths are as many as its pixels: there the batch alone is a symbol.
    free = "b" if operation == "selective_scan_2d" else "bt"
    symbols = {axis: export.symbolic_shape(axis, scope=scope)[0] for axis in free}

    def struct(name, x):
        if isinstance(x, tuple):  # a state of several arrays, the batch first
            return type(x)(*(jax.ShapeDtypeStruct((symbols["b"], *y.shape[1:]), y.dtype) for y in x))
        if not hasattr(x, "dtype"):  # weights of several arrays, without such axes
            return structs_of(x)
        axes = row.axes_of(name, arguments).split()
        shape = [symbols.get(axis, size) for axis, size in zip(axes, x.shape, strict=True)]
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def call(floats, arrays):
        return row.call(None, **floats, **arrays, **static)

    structs = [{n: struct(n, x) for n, x in given.items()} for given in (floats, arrays)]
    program = export.export(jax.jit(call), platforms=["cpu"])(*structs)
    for other in ({}, {"B": 1} | ({} if free == "b" else {"T": 70})):
        arguments = row.arguments(row.small | other)
        given = jax.tree.map(jnp.asarray, parts(arguments)[:2])
        assert_close(program.call(*given), run(row, arguments), "float32")


def test_gradients_export_too(unchecked_types):
    """The one whose chunks are chosen by the sizes, where a number is known."""
    row = OPERATIONS["linear_attention"]
    b, t = export.symbolic_shape("b, t")
    arguments = {n: np.asarray(x) for n, x in row.arguments(row.small).items()}
    shapes = {"q": (b, t, 4, 4), "k": (b, t, 2, 4), "v": (b, t, 2, 3), "segment_ids": (b, t)}
    structs = {n: jax.ShapeDtypeStruct(shape, arguments[n].dtype) for n, shape in shapes.items()}

    def loss(floats, ids):
        out, _ = row.function(**floats, segment_ids=ids)
        return jnp.sum(jnp.sin(out))

    ids = structs.pop("segment_ids")
    gradient = jax.jit(jax.grad(loss))
    program = export.export(gradient, platforms=["cpu"])(structs, ids)
    given = {n: arguments[n] for n in structs}, arguments["segment_ids"]
    assert_close(program.call(*given), gradient(*given), "float32")


def test_kernels_say_that_they_need_numbers(unchecked_types):
    """Exported for a chip, a call of any size is the portable form there."""
    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 128, 128), jnp.float32)
    row = OPERATIONS["linear_recurrence"]
    program = export.export(jax.jit(row.function), platforms=["tpu"])(x, x)
    assert "tpu_custom_call" not in program.mlir_module()


def test_an_optimizers_leaf_has_a_size(unchecked_types):
    moment = frugax.formats.quantize(jnp.zeros((2, 256)), "dynamic8", axis=-1, group_size=256)
    (n,) = export.symbolic_shape("n")
    step = jax.jit(lambda g: frugax.kernels.quantized_update("momentum", g, (moment,), (0.9,))[0])
    with pytest.raises(ValueError, match=r"grad: got float32\[n, 256\]; expected sizes that are numbers"):
        export.export(step)(jax.ShapeDtypeStruct((n, 256), jnp.float32))
