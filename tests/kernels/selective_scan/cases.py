"""Calls of selective_scan that its tests share, and how one is run."""

import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import frugax
from tests.seeds import generator

FLOATS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


@dataclass(frozen=True)
class Case:
    """One call. `whole`: with D, z, dt_bias and softplus; else the recurrence alone, dt >= 0."""

    T: int
    D: int = 24
    N: int = 16
    B: int = 2
    whole: bool = False
    state: bool = False
    packed: bool = False
    strong: bool = False  # rates and steps of very different sizes
    dtype: str = "float32"

    def __str__(self):
        flags = [name for name in ("whole", "state", "packed", "strong") if getattr(self, name)]
        return "-".join([f"B{self.B}", f"T{self.T}", f"D{self.D}", f"N{self.N}", *flags, self.dtype])

    def arguments(self) -> dict:
        """Random numpy arrays, the same at every call. Those of size T are in the case's dtype."""
        rng = generator(zlib.crc32(str(self).encode()))
        B, T, D, N = self.B, self.T, self.D, self.N
        tokens, wide = jnp.dtype(self.dtype), np.float64 if self.dtype == "float64" else np.float32
        spread = 3.0 if self.strong else 0.5
        normal = lambda *shape: rng.standard_normal(shape)  # noqa: E731
        dt = normal(B, T, D) * spread - 1
        args = {
            "x": normal(B, T, D).astype(tokens),
            "dt": (dt if self.whole else np.exp(dt)).astype(tokens),
            "A": -np.exp(spread * normal(D, N)).astype(wide),
            "B": normal(B, T, N).astype(tokens),
            "C": normal(B, T, N).astype(tokens),
        }
        if self.whole:
            args |= {"D": normal(D).astype(wide), "z": normal(B, T, D).astype(tokens)}
            args |= {"dt_bias": normal(D).astype(wide), "dt_softplus": True}
        if self.state:
            args["initial_state"] = normal(B, D, N).astype(wide)
        if self.packed:
            starts = rng.random((B, T)) < 4 / T
            args["segment_ids"] = np.cumsum(starts, axis=1).astype(np.int32) % 3  # an id may come back later
        return args


def split(arguments: dict) -> tuple[dict, dict]:
    """(float arguments, the rest), as jax arrays."""
    arrays = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
    floats = {n: x for n, x in arrays.items() if n in FLOATS}
    return floats, {n: x for n, x in arrays.items() if n not in FLOATS}


def widen(arguments: dict) -> dict:
    return {n: np.asarray(x, np.float64) if n in FLOATS else x for n, x in arguments.items()}


def cotangents(arguments: dict):
    """Fixed random weights of (y, final state), rounded as y is."""
    rng = np.random.default_rng(7)
    B, _, D = arguments["x"].shape
    dy = rng.standard_normal(arguments["x"].shape).astype(jnp.bfloat16).astype(np.float32)
    return dy, rng.standard_normal((B, D, arguments["A"].shape[1])).astype(np.float32)


def value_and_gradients(arguments: dict, backend: str | None):
    """(y, final state) and the gradient of every float argument, for the weights of `cotangents`."""
    floats, rest = split(arguments)

    @jax.jit
    def run(floats):
        call = lambda floats: frugax.kernels.selective_scan(**floats, **rest, backend=backend)  # noqa: E731
        out, pullback = jax.vjp(call, floats)
        weights = (jnp.asarray(w, x.dtype) for w, x in zip(cotangents(arguments), out, strict=True))
        return out, pullback(tuple(weights))[0]

    return run(floats)


def in_float64(arguments: dict):
    """What `value_and_gradients` should give: the reference in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, value_and_gradients(widen(arguments), "reference"))
