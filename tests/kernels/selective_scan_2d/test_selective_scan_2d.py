"""Scans of images against loops over pixels in numpy, and the one-dimensional definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import frugax
from tests.errors import assert_close
from tests.kernels.selective_scan.definition import selective_scan

SIZES = [(4, 6), (5, 3), (1, 4)]


def visits(height, width, scan, step):
    """The (row, column) of each token of each path, as the papers draw them; some lie outside."""
    if scan == "cross":
        rows = [(i, j) for i in range(height) for j in range(width)]
        columns = [(i, j) for j in range(width) for i in range(height)]
        return [rows, columns, rows[::-1], columns[::-1]]
    down, across = range(0, height, step), range(0, width, step)
    paths = []
    for column in range(step):
        for row in range(step):
            if len(paths) % 2 == 0:
                paths.append([(i + row, j + column) for i in down for j in across])
            else:
                paths.append([(i + row, j + column) for j in across for i in down])
    return paths


def arguments(height, width, scan, step, seed=0):
    B, D, N = 2, 5, 3
    rng = np.random.default_rng(seed)
    paths = visits(height, width, scan, step)
    P, T = len(paths), len(paths[0])
    return paths, {
        "x": rng.standard_normal((B, height, width, D)),
        "dt": rng.standard_normal((P, B, T, D)),
        "A": -np.exp(rng.standard_normal((P, D, N))),
        "B": rng.standard_normal((P, B, T, N)),
        "C": rng.standard_normal((P, B, T, N)),
        "D": rng.standard_normal((P, D)),
        "dt_bias": rng.standard_normal((P, D)),
    }


def by_pixels(paths, args):
    x = args["x"]
    B, height, width, _ = x.shape
    y = np.zeros(x.shape)
    for p, path in enumerate(paths):
        shared = {n: args[n][p] for n in ("A", "D", "dt_bias")}
        for b in range(B):
            inside = [i < height and j < width for i, j in path]
            padded = np.pad(x[b], ((0, 3), (0, 3), (0, 0)))
            tokens = np.stack([padded[i, j] for i, j in path])
            own = {n: args[n][p, b] for n in ("dt", "B", "C")}
            out, _ = selective_scan(tokens, **own, **shared, dt_softplus=True)
            for t, (i, j) in enumerate(path):
                if inside[t]:
                    y[b, i, j] += out[t]
    return y


@pytest.mark.parametrize(("scan", "step"), [("cross", 2), ("atrous", 2), ("atrous", 3)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_a_loop_over_pixels(size, scan, step):
    """The four-way cross scan is four explicit scans; an atrous one is a scan of each skip-sampled grid."""
    paths, args = arguments(*size, scan, step)
    floats = {n: jnp.asarray(x, jnp.float32) for n, x in args.items()}
    y = frugax.kernels.selective_scan_2d(**floats, scan=scan, step=step, dt_softplus=True)
    assert_close(y, by_pixels(paths, args), "float32")


@pytest.mark.parametrize("scan", ["cross", "atrous"])
def test_gradients(scan):
    """Along a random direction of every argument, against finite differences of the loop over pixels."""
    paths, args = arguments(3, 5, scan, 2)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(args["x"].shape)

    with jax.enable_x64(True):

        def loss(floats):
            y = frugax.kernels.selective_scan_2d(**floats, scan=scan, dt_softplus=True)
            return jnp.sum(y * weights)

        gradient = jax.grad(loss)({n: jnp.asarray(x) for n, x in args.items()})
        gradient = {n: np.asarray(g) for n, g in gradient.items()}
    for name in args:
        direction, e = rng.standard_normal(args[name].shape), 1e-6
        sides = [by_pixels(paths, {**args, name: args[name] + s * e * direction}) for s in (1, -1)]
        slope = np.sum((sides[0] - sides[1]) * weights) / (2 * e)
        # A difference of sums of about 100 numbers loses some 1e-14 / e.
        assert abs(np.vdot(gradient[name], direction) - slope) < 1e-7 * np.linalg.norm(gradient[name]), name


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_paths_and_back(size):
    """Each pixel lies on one atrous path, and on all four cross paths."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, *size, 3)), jnp.float32)
    for scan, step, times in (("atrous", 2, 1), ("atrous", 3, 1), ("cross", 2, 4)):
        paths = frugax.kernels.paths_2d(x, scan=scan, step=step)
        image = frugax.kernels.merge_paths_2d(paths, *size, scan=scan, step=step)
        np.testing.assert_allclose(image, times * x, rtol=1e-6)


def test_atrous_scans_a_quarter_of_the_tokens():
    x = jax.ShapeDtypeStruct((1, 32, 48, 8), jnp.float32)
    cross = jax.eval_shape(lambda x: frugax.kernels.paths_2d(x, scan="cross"), x)
    for step in (1, 2, 4):
        atrous = jax.eval_shape(lambda x, s=step: frugax.kernels.paths_2d(x, scan="atrous", step=s), x)
        assert atrous.shape[2] * step**2 == cross.shape[2]
        assert atrous.shape[0] * atrous.shape[2] * 4 == cross.shape[0] * cross.shape[2]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scan": "spiral"}, "scan: got 'spiral'; expected 'cross' or 'atrous'"),
        ({"step": 0}, "step: got 0; expected an integer >= 1"),
        ({"x": jnp.ones((4, 6, 5))}, r"x: got float32\[4, 6, 5\]; expected \[batch, height, width, D\]"),
        (
            {"A": -jnp.ones((3, 5, 3))},
            r"A: got float32\[3, 5, 3\]; expected a first axis of 4, one for each path",
        ),
        (
            {"dt": jnp.ones((4, 2, 23, 5))},
            r"dt: got .*; expected \[4, 2, 24\] and its channels",
        ),
        ({"B": jnp.ones((4, 2, 24, 2))}, r"B: got float32\[2, 24, 2\]; expected \[2, 24, 3\]"),
    ],
)
def test_names_the_argument(change, message):
    _, args = arguments(4, 6, "cross", 2)
    floats = {n: jnp.asarray(x, jnp.float32) for n, x in args.items()}
    with pytest.raises(ValueError, match=message):
        frugax.kernels.selective_scan_2d(**{**floats, "dt_softplus": True, **change})


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("step", "tokens"), [(2, 2), (4, 1)])
def test_an_image_that_the_step_does_not_divide_has_more_tokens(step, tokens):
    """Of 5 x 3 pixels a grid has ceil(5 / step) * ceil(3 / step), not the quotient rounded down."""
    _, args = arguments(5, 3, "atrous", step)
    floats = {n: jnp.asarray(x, jnp.float32) for n, x in args.items()}
    P, B, T = args["dt"].shape[:3]
    assert T > tokens == (5 // step) * max(3 // step, 1)
    floats["dt"] = floats["dt"][:, :, :tokens]
    with pytest.raises(ValueError, match=rf"dt: got .*; expected \[{P}, {B}, {T}\] and its channels"):
        frugax.kernels.selective_scan_2d(**floats, scan="atrous", step=step)


@pytest.mark.parametrize(
    ("name", "value", "softplus", "message"),
    [
        ("A", 0.1, True, "A: a value is positive"),
        ("dt", -0.1, False, "dt: a value is negative"),
        ("dt", -0.1, True, None),
    ],
)
def test_signs_are_caught_under_checkify(name, value, softplus, message):
    _, args = arguments(3, 2, "atrous", 2)
    floats = {n: jnp.asarray(x, jnp.float32) for n, x in args.items() if n != "dt_bias"}
    floats["dt"] = abs(floats["dt"])
    floats[name] = floats[name].at[-1].set(value)  # of the last path alone

    def call(floats):
        return frugax.kernels.selective_scan_2d(**floats, scan="atrous", dt_softplus=softplus)

    error, _ = checkify.checkify(jax.jit(call), errors=checkify.user_checks)(floats)
    assert (error.get() is None) if message is None else (message in error.get())


def test_merging_names_the_argument():
    with pytest.raises(
        ValueError, match=r"paths: got .*; expected \[4, batch, 12, D\] \(paths of a 3 x 4 image\)"
    ):
        frugax.kernels.merge_paths_2d(jnp.ones((4, 1, 6, 2)), 3, 4)
