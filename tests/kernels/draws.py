"""Random arguments that all operations draw, and the traits by which kernels tell cases apart."""

import jax.numpy as jnp
import numpy as np


def ones(shape, dtype=np.float32):
    """Return ones for tables of arguments, without a program a shape while tests are collected."""
    return jnp.asarray(np.ones(shape, dtype))


def document_ids(rng: np.random.Generator, B: int, T: int) -> np.ndarray:
    """Return the ids of some four documents a row; an id may come back later."""
    return np.cumsum(rng.random((B, T)) < 4 / T, axis=1).astype(np.int32) % 3


def wide(dtype: str) -> type:
    """Return the dtype of states and parameters beside inputs of a dtype."""
    return np.float64 if dtype == "float64" else np.float32


def sizes(case: dict) -> set:
    """Return what kernels have code of their own for: flags, dtypes, one token or tap, many channels."""
    given = {"dtype": "float32"} | case
    flags = {name for name, x in given.items() if x is True or isinstance(x, list)}
    names = {f"{name} {x}" for name, x in given.items() if x is None or x is False or isinstance(x, str)}
    ones = {f"{name} = 1" for name in "TNW" if given.get(name) == 1}
    many = {f"{name} > {most}" for name, most in (("D", 128), ("N", 16)) if given.get(name, 1) > most}
    return flags | names | ones | many
