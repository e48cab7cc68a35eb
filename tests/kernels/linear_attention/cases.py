"""The calls that every backend of linear_attention is tried on, and the float64 answers they are held to."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import frugax
from tests.seeds import generator

FLOATS = ("q", "k", "v", "log_decay", "bonus", "initial_state")


@dataclass(frozen=True)
class Case:
    """One call. `decay` names the shape of log_decay; `mildest`, `strongest` bound its values."""

    T: int
    heads: tuple[int, int, int] = (2, 2, 2)  # of q, k, v
    K: int = 16
    V: int = 24
    B: int = 2
    decay: str | None = None  # None, "h", "bth" or "bthk"
    mildest: float = -0.01
    strongest: float = -0.5
    bonus: bool = False
    state: bool = False
    packed: bool = False
    scale: float | None = None
    dtype: str = "float32"

    def __str__(self):
        parts = [
            f"T{self.T}",
            f"K{self.K}",
            f"V{self.V}",
            "x".join(map(str, self.heads)),
            self.decay or "none",
        ]
        parts += [name for name in ("bonus", "state", "packed") if getattr(self, name)]
        return "-".join([*parts, f"to{self.strongest}", self.dtype])

    def traits(self) -> set[str]:
        """What a kernel has code of its own for."""
        flags = {name for name in ("bonus", "state", "packed") if getattr(self, name)}
        several = {"groups"} if len(set(self.heads)) > 1 else set()
        strong = {f"strong {self.decay}"} if self.strongest < -1 and self.decay != "h" else set()
        sizes = {"one token"} if self.T == 1 else {f"K = {self.K}"}
        return flags | several | strong | sizes | {f"decay {self.decay}", self.dtype}

    def arguments(self) -> dict:
        """Random arguments in the case's dtype, as numpy arrays: the same at every call."""
        rng = generator(self.T * 1009 + self.K)
        H = max(self.heads)
        shapes = {name: (self.B, self.T, h, self.K) for name, h in zip("qk", self.heads, strict=False)}
        shapes["v"] = (self.B, self.T, self.heads[2], self.V)
        dtype = jnp.dtype(self.dtype)
        args = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
        if self.decay:
            shape = {"h": (H,), "bth": (self.B, self.T, H), "bthk": (self.B, self.T, H, self.K)}[self.decay]
            # Evenly spread on a log scale: strong and mild gates side by side.
            low, high = np.log(-self.mildest), np.log(-self.strongest)
            args["log_decay"] = (-np.exp(rng.uniform(low, high, shape))).astype(np.float32)
        if self.bonus:
            args["bonus"] = rng.standard_normal((H, self.K)).astype(np.float32)
        if self.state:
            args["initial_state"] = rng.standard_normal((self.B, H, self.K, self.V)).astype(np.float32)
        if self.packed:
            starts = rng.random((self.B, self.T)) < 4 / self.T
            args["segment_ids"] = np.cumsum(starts, axis=1).astype(np.int32) % 3  # an id may come back later
        if self.scale is not None:
            args["scale"] = self.scale
        return args


def attend(**arguments):
    """linear_attention, with numpy arrays made jax's."""
    static = {n: x for n, x in arguments.items() if n in ("scale", "backend")}
    arrays = {n: jnp.asarray(x) for n, x in arguments.items() if n not in static}
    return jax.jit(lambda a: frugax.kernels.linear_attention(**a, **static))(arrays)


def value_and_gradients(arguments: dict, backend: str | None) -> tuple[dict, dict]:
    """{out, final_state} and the gradient of every float argument, for fixed random cotangents."""
    floats = {name: jnp.asarray(arguments[name]) for name in FLOATS if name in arguments}
    rest = {name: x for name, x in arguments.items() if name not in FLOATS}

    @jax.jit
    def run(floats, cotangent):
        def f(floats):
            return attend(**floats, **rest, backend=backend)

        out, pullback = jax.vjp(f, floats)
        rng = np.random.default_rng(7)
        cotangents = tuple(jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in out)
        return out, pullback(cotangents)[0]

    (out, state), gradients = run(floats, None)
    return {"out": out, "final_state": state}, gradients


def expected(arguments: dict) -> tuple[dict, dict]:
    """The same from the token-by-token definition in float64."""
    with jax.enable_x64(True):
        wide = {n: x.astype(np.float64) if n in FLOATS else x for n, x in arguments.items()}
        return jax.tree.map(np.asarray, value_and_gradients(wide, "reference"))
