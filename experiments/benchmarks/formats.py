"""Bits and errors of every number format, on numbers with and without heavy tails.

  python -m experiments.benchmarks.formats              two minutes on a core; writes the JSON

Errors are rms(dequantized - x) / rms(x) of a matrix. Minifloats and integers of as many bits are compared
with a scale for each 128, searched for the least squared error; bipolar and symmetric integers for each 64.
"""

import functools
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.benchmarks.interleaved import about, save
from frugax.formats import (
    AbsMax,
    Format,
    Integer,
    LeastSquares,
    Minifloat,
    MinMax,
    PowerOfTwo,
    TwoLevel,
    format_named,
    quantize,
)

RESULTS = Path(__file__).parent / "results" / "formats.json"
SHAPE = (1024, 512)
GROUP = 128  # of formats that have no group size of their own
NAMES = (
    *("int1", "int2", "int3", "int4", "int5", "int6", "int7", "int8"),
    *("uint2", "uint3", "uint4", "uint5", "uint6", "uint8"),
    *(
        "bipolar2",
        "bipolar3",
        "bipolar4",
        "ternary",
        "ternary_minmax",
        "nf4",
        "nf4_dq",
        "bitmod3",
        "bitmod4",
        "olive4",
        "olive8",
    ),
    *("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2"),
    *("mxfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2", "mxint8", "nvfp4", "bfp4", "bfp6", "bfp8"),
)


@functools.cache
def draws() -> dict[str, np.ndarray]:
    """Matrices by how their elements are distributed."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(SHAPE)
    x = {
        "normal": normal,
        "student_t4": rng.standard_t(4, SHAPE),
        "zeros": np.where(rng.random(SHAPE) < 0.8, 0, normal),
    }
    return {name: value.astype(np.float32) for name, value in x.items()}


@functools.partial(jax.jit, static_argnames=("format", "group_size"))
def _error(x: Array, format: Format, group_size: int | None) -> Array:
    off = quantize(x, format, group_size=group_size).dequantize() - x
    return jnp.sqrt(jnp.mean(off**2) / jnp.mean(x**2))


def errors(format: Format, group_size: int | None, which: Iterable[str]) -> dict[str, float]:
    """The error on each of the distributions."""
    return {name: round(float(_error(draws()[name], format, group_size)), 5) for name in which}


def scales(format: Format) -> str:
    """Say how a format stores scales."""
    match format.scheme:
        case PowerOfTwo():
            return "powers of two, 8 bits"
        case TwoLevel(by_column=True):
            return "8 bits, float32 a column"
        case TwoLevel(block=int(block)):
            return f"8 bits, float32 a block of {block}"
        case TwoLevel():
            return "8 bits, float32 a matrix"
        case MinMax():
            return "two bfloat16"
        case AbsMax():
            return "float32"
    raise ValueError(f"format: got {format.scheme} of {format.name}; expected a known scheme")


def named() -> dict[str, dict]:
    """Measure the bits that each format stores, and its error."""
    rows = {}
    for name in NAMES:
        format = format_named(name)
        one = name == "ternary" or format.paired  # a scale for a matrix, or a column
        size = None if one else format.group_size or GROUP
        x = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
        stored = jax.eval_shape(lambda x, f=format, s=size: quantize(x, f, group_size=s), x)
        rows[name] = {
            "bits": round(stored.nbytes * 8 / np.prod(SHAPE), 3),
            "group": "matrix" if name == "ternary" else "column" if one else size,
            "scales": scales(format) + (", zeros in 8" if stored.zeros is not None else ""),
            "error": errors(format, size, ("normal", "student_t4")),
        }
        print(name, rows[name], flush=True)
    return rows


def minifloats_and_integers() -> dict[str, dict[str, dict[str, float]]]:
    """Errors by bits, of integers and of every minifloat with a mantissa or without."""
    search = LeastSquares(steps=24, least=0.4)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for bits in range(3, 9):
        elements = {"integer": Integer(f"int{bits}", bits, True)}
        for exponent in range(1, min(bits, 6)):
            elements[f"e{exponent}"] = Minifloat.of(exponent, bits - 1 - exponent)
        rows[str(bits)] = {
            what: errors(Format(what, element, search), GROUP, ("normal", "student_t4"))
            for what, element in elements.items()
        }
        print(bits, rows[str(bits)], flush=True)
    return rows


def bipolar_and_integers() -> dict[str, dict[str, dict[str, float]]]:
    """Errors by bits; of both with the largest magnitude at the largest code."""
    rows = {}
    for bits in range(2, 9):
        integer = Format("integer", Integer(f"int{bits}", bits, True))
        both = {"bipolar": format_named(f"bipolar{bits}"), "integer": integer}
        rows[str(bits)] = {what: errors(format, 64, ("normal", "zeros")) for what, format in both.items()}
    return rows


def main() -> None:
    result = {
        "shape": list(SHAPE),
        "formats": named(),
        "minifloats": minifloats_and_integers(),
        "bipolar": bipolar_and_integers(),
    }
    save(RESULTS, about() | result)


if __name__ == "__main__":
    main()
