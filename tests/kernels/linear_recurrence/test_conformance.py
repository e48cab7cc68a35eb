"""Every backend of linear_recurrence against float64 numpy: values, gradients, states, packing, sizes."""

import zlib
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.cases import served
from tests.errors import assert_close
from tests.seeds import generator

from . import definition

BACKENDS = ["reference", "xla", "pallas_tpu", "pallas_gpu"]
FLOATS = ("a", "b", "initial_state")


@dataclass(frozen=True)
class Case:
    """One call. `strongest`: a lies between it and its negative; None: between 0 and 1, as gates do."""

    T: int
    D: int = 60
    B: int = 2
    strongest: float | None = None
    state: bool = False
    packed: bool = False
    reverse: bool = False
    dtype: str = "float32"
    a_dtype: str | None = None  # None: dtype

    def __str__(self):
        flags = [name for name in ("state", "packed", "reverse") if getattr(self, name)]
        sign = [] if self.strongest is None else [f"upto{self.strongest}"]
        return "-".join(
            [f"B{self.B}", f"T{self.T}", f"D{self.D}", *flags, *sign, self.a_dtype or "", self.dtype]
        )

    def arguments(self) -> dict:
        """Random arguments in the case's dtype, as numpy arrays: the same at every call."""
        rng = generator(zlib.crc32(str(self).encode()))
        shape, dtype = (self.B, self.T, self.D), jnp.dtype(self.dtype)
        if self.strongest is None:
            a = 1 / (1 + np.exp(-rng.normal(1, 2, shape)))
        else:
            a = rng.uniform(-self.strongest, self.strongest, shape)
        args = {
            "a": a.astype(jnp.dtype(self.a_dtype or dtype)),
            "b": rng.standard_normal(shape).astype(dtype),
        }
        if self.state:
            wide = np.float64 if self.dtype == "float64" else np.float32
            args["initial_state"] = rng.standard_normal((self.B, self.D)).astype(wide)
        if self.packed:
            starts = rng.random((self.B, self.T)) < 4 / self.T
            args["segment_ids"] = np.cumsum(starts, axis=1).astype(np.int32) % 3  # an id may come back later
        return {**args, "reverse": self.reverse}


CASES = [
    Case(T=1, D=1, B=1, state=True),
    Case(T=1, D=200, state=True, reverse=True),
    Case(T=7, D=1, state=True, packed=True),
    Case(T=7, D=200, state=True, reverse=True),
    Case(T=63, state=True, packed=True, strongest=1.3),
    Case(T=130, B=1, strongest=1.3),
    Case(T=130, D=200, state=True, packed=True, reverse=True, strongest=1.3),
    Case(T=130, D=129, B=3, state=True),
    Case(T=63, state=True, packed=True, dtype="bfloat16"),
    Case(T=130, D=200, state=True, reverse=True, dtype="bfloat16"),
    Case(T=63, D=60, state=True, dtype="bfloat16", a_dtype="float32"),
]
WIDE = [replace(case, dtype="float64") for case in CASES[2:8]]
# A GPU's tiles of 32 tokens and 128 channels are interpreted slowly: few cases, each with several turns.
ON_GPU = [
    CASES[0],
    Case(T=70, D=130, B=1, state=True, packed=True, strongest=1.3),
    Case(T=70, D=60, B=2, state=True, reverse=True, packed=True, strongest=1.3),
    Case(T=40, D=60, B=1, state=True, dtype="bfloat16"),
    Case(T=40, D=60, B=1, reverse=True, dtype="bfloat16", a_dtype="float32"),
]
SERVED = {"reference": CASES + WIDE, "xla": CASES + WIDE, "pallas_tpu": CASES, "pallas_gpu": ON_GPU}


def as_jax(arguments: dict) -> dict:
    return {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in arguments.items()}


def call(backend=None, **arguments):
    return frugax.kernels.linear_recurrence(**as_jax(arguments), backend=backend)


def cotangents(arguments: dict, h_dtype, state_dtype):
    B, T, D = arguments["b"].shape
    rng = np.random.default_rng(7)
    return rng.standard_normal((B, T, D)).astype(h_dtype), rng.standard_normal((B, D)).astype(state_dtype)


def value_and_gradients(arguments: dict, backend: str | None):
    """(h, h_T) and the gradient of every float argument, for fixed random cotangents."""
    floats = {n: x for n, x in as_jax(arguments).items() if n in FLOATS}
    rest = {n: x for n, x in arguments.items() if n not in FLOATS}

    @jax.jit
    def run(floats):
        out, pullback = jax.vjp(lambda floats: call(backend, **floats, **rest), floats)
        random = cotangents(arguments, *(x.dtype for x in out))
        return out, pullback(tuple(map(jnp.asarray, random)))[0]

    return run(floats)


def expected(arguments: dict, h_dtype, state_dtype):
    wide = {n: np.asarray(x, np.float64) if n in FLOATS else x for n, x in arguments.items()}
    given = {"initial_state": None, "segment_ids": None, **wide}
    random = cotangents(arguments, h_dtype, state_dtype)
    da, db, dstate = definition.gradients(**given, dh=random[0].astype(float), dstate=random[1].astype(float))
    gradients = dict(a=da, b=db, initial_state=dstate)
    return definition.recurrence(**wide), {n: g for n, g in gradients.items() if n in arguments}


@pytest.mark.parametrize(
    ("backend", "case"),
    served(SERVED),
)
def test_values_and_gradients(backend, case):
    arguments = case.arguments()
    with jax.enable_x64(case.dtype == "float64"):
        (h, state), gradients = value_and_gradients(arguments, backend)
        assert h.dtype == case.dtype
        assert state.dtype == (jnp.float64 if case.dtype == "float64" else jnp.float32)
        assert {n: g.dtype for n, g in gradients.items()} == {n: arguments[n].dtype for n in gradients}
        (want_h, want_state), want_gradients = expected(arguments, h.dtype, state.dtype)
    assert_close(h, want_h, h.dtype, name="h")
    assert_close(state, want_state, state.dtype, name="h_T")  # float32 even where h is bfloat16
    assert_close(gradients, want_gradients, h.dtype, name="d")


@pytest.mark.parametrize("backend", ["reference", "xla", "pallas_tpu"])
@pytest.mark.parametrize("reverse", [False, True])
def test_split_and_packed_equal_whole(backend, reverse):
    a = Case(T=100, D=40, B=1, state=True, reverse=reverse).arguments()
    whole, final = call(backend, **a)

    def part(tokens, state):
        return call(backend, **{**a, "a": a["a"][:, tokens], "b": a["b"][:, tokens], "initial_state": state})

    sides = [slice(0, 37), slice(37, 100)]
    sides = sides[::-1] if reverse else sides
    first, between = part(sides[0], a["initial_state"])
    second, last = part(sides[1], between)
    fresh, fresh_last = part(sides[1], jnp.zeros_like(between))

    def joined(*parts):
        return jnp.concatenate(parts[::-1] if reverse else parts, axis=1)

    assert_close((joined(first, second), last), (whole, final), "float32")
    packed = call(backend, **a, segment_ids=(np.arange(100) >= 37)[None].astype(np.int32))
    assert_close(packed, (joined(first, fresh), fresh_last), "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_crosses_a_boundary(backend):
    """What one document's outputs say about another's inputs is exactly nothing."""
    a = Case(T=40, D=8, B=1, state=True).arguments()
    ids = jnp.asarray((np.arange(40) >= 13)[None].astype(np.int32))
    floats = as_jax({n: a[n] for n in FLOATS})

    def second_document(floats):
        h, state = call(backend, **floats, segment_ids=ids)
        return jnp.sum(h[:, 13:] ** 2) + jnp.sum(state)

    gradient = jax.grad(second_document)(floats)
    assert not gradient["a"][:, :14].any()  # token 13's own a multiplies nothing
    assert not gradient["b"][:, :13].any()
    assert not gradient["initial_state"].any()
    assert gradient["a"][:, 14:].all()
    assert gradient["b"][:, 13:].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_equals_a_loop(backend):
    a = Case(T=33, D=24, state=True).arguments()
    rest = {"reverse": a.pop("reverse")}
    stacked = {n: jnp.stack([x, x[::-1]]) for n, x in a.items()}

    # jax 0.10's GPU interpreter has effects, which a vmapped and jitted choice of platform can't have.
    compiled = (lambda f: f) if backend == "pallas_gpu" else jax.jit

    def with_gradient(a):
        def loss(a):
            h, state = call(backend, **a, **rest)
            return jnp.sum(jnp.sin(h)) + jnp.sum(state**2)

        return jax.value_and_grad(loss)(a)

    got = compiled(jax.vmap(with_gradient))(stacked)
    want = [
        with_gradient({n: jnp.asarray(x[flip]) for n, x in a.items()})
        for flip in (slice(None), slice(None, None, -1))
    ]
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), "float32")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_forward_mode_and_second_derivatives(backend, reverse):
    """jvp equals vjp, the Hessian along two directions is symmetric, and both are float64's."""
    case = Case(T=20, D=4, B=1, state=True, packed=True, reverse=reverse)

    def measure(dtype, backend):
        arguments = case.arguments()
        a = {n: jnp.asarray(arguments[n], dtype) for n in FLOATS}
        rest = {"segment_ids": arguments["segment_ids"], "reverse": reverse}
        rng = np.random.default_rng(3)
        left, right = (
            {n: jnp.asarray(rng.standard_normal(x.shape), dtype) for n, x in a.items()} for _ in "lr"
        )

        def loss(a):
            h, state = call(backend, **a, **rest)
            return jnp.sum(jnp.sin(h)) + jnp.sum(state**2)

        def along(direction):
            return lambda a: jax.jvp(loss, (a,), (direction,))[1]

        def dot(x, y):
            return sum(jnp.vdot(x[n], y[n]) for n in x)

        slopes = [along(left)(a), dot(jax.grad(loss)(a), left)]
        forward_over_forward = jax.jvp(along(left), (a,), (right,))[1]
        reverse_over_forward = dot(jax.grad(along(left))(a), right)
        forward_over_reverse = dot(jax.jvp(jax.grad(loss), (a,), (right,))[1], left)
        reverse_over_reverse = dot(jax.grad(lambda a: dot(jax.grad(loss)(a), left))(a), right)
        return slopes, [
            forward_over_forward,
            reverse_over_forward,
            forward_over_reverse,
            reverse_over_reverse,
        ]

    with jax.enable_x64(True):
        slopes, curvatures = measure(jnp.float64, "reference")
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-12)
    np.testing.assert_allclose(curvatures, curvatures[0], rtol=1e-12)
    # A sum of signed terms can be smaller than they are: ten times is room for that.
    assert_close(measure(jnp.float32, backend), (slopes, curvatures), "float32", times=10)


def test_gates_of_every_strength_over_65536_tokens():
    """Products of a's that underflow at once, or that would overflow within a chunk: only h itself counts."""
    rng = np.random.default_rng(0)
    shape = (1, 65536, 4)
    b = rng.standard_normal(shape).astype(np.float32)
    fading = np.exp(-np.exp(rng.uniform(np.log(1e-4), np.log(50), shape))).astype(np.float32)
    bursts = np.where(np.arange(shape[1])[:, None] % 100 == 0, 1e-30, 2.0) * np.ones(shape)
    grown = np.arange(shape[1])[:, None] % 100 >= 80  # 20 tokens at 2.0, before each 1e-30
    for gates, source in ((fading, b), (bursts.astype(np.float32), b * grown)):
        got = call("xla", a=gates, b=source)
        assert_close(got, definition.recurrence(gates.astype(float), source.astype(float)), "float32")


@pytest.mark.parametrize("reverse", [pytest.param(False, marks=pytest.mark.full), True])
def test_many_blocks_on_tpu(reverse):
    """More tokens and channels than one block has, with a remainder of both. (A GPU's tiles are small.)"""
    arguments = Case(T=1100, D=600, B=1, state=True, reverse=reverse).arguments()
    with jax.enable_x64(True):
        wide = {n: x.astype(np.float64) if n in FLOATS else x for n, x in arguments.items()}
        want = jax.tree.map(np.asarray, value_and_gradients(wide, "reference"))
    assert_close(value_and_gradients(arguments, "pallas_tpu"), want, "float32")


def test_gradient_keeps_a_and_h_alone():
    """Temporaries of forward and gradient: h, and what comes back through it; no more for a longer T."""

    def temporaries(T):
        x = jax.ShapeDtypeStruct((2, T, 128), jnp.float32)

        def loss(a, b, w):
            return jnp.sum(call("xla", a=a, b=b)[0] * w)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (2 * T * 128 * 4)

    assert temporaries(512) < 3.5
    assert temporaries(4096) < 3.5
