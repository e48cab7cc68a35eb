"""Properties of selective_scan_2d alone: its paths over an image, and how many tokens they hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.kernels.harness import OPERATIONS

SIZES = [pytest.param((4, 6), marks=pytest.mark.full), (5, 3), pytest.param((1, 4), marks=pytest.mark.full)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_paths_and_back(size):
    """Each pixel lies on one atrous path, and on all four cross paths."""
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)

    @partial(jax.jit, static_argnames=("scan", "step"))
    def there_and_back(x, **how):
        return frugax.kernels.merge_paths_2d(frugax.kernels.paths_2d(x, **how), *size, **how)

    for scan, step, times in (("atrous", 2, 1), ("atrous", 3, 1), ("cross", 2, 4)):
        np.testing.assert_allclose(there_and_back(x, scan=scan, step=step), times * x, rtol=1e-6)


def test_atrous_scans_a_quarter_of_the_tokens():
    x = jax.ShapeDtypeStruct((1, 32, 48, 8), jnp.float32)
    cross = jax.eval_shape(lambda x: frugax.kernels.paths_2d(x, scan="cross"), x)
    for step in (1, 2, 4):
        atrous = jax.eval_shape(lambda x, s=step: frugax.kernels.paths_2d(x, scan="atrous", step=s), x)
        assert atrous.shape[2] * step**2 == cross.shape[2]
        assert atrous.shape[0] * atrous.shape[2] * 4 == cross.shape[0] * cross.shape[2]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("step", "tokens"), [(2, 2), (4, 1)])
def test_an_image_that_the_step_does_not_divide_has_more_tokens(step, tokens):
    """A grid has ceil(5 / step) * ceil(3 / step) of 5 x 3 pixels, not the quotient rounded down."""
    arguments = OPERATIONS["selective_scan_2d"].arguments({"size": (5, 3), "scan": "atrous", "step": step})
    P, B, T = arguments["dt"].shape[:3]
    assert T > tokens == (5 // step) * max(3 // step, 1)
    arguments["dt"] = arguments["dt"][:, :, :tokens]
    with pytest.raises(ValueError, match=rf"dt: got .*; expected \[{P}, {B}, {T}\] and its channels"):
        frugax.kernels.selective_scan_2d(**arguments)


def test_merging_names_the_argument():
    with pytest.raises(
        ValueError, match=r"paths: got .*; expected \[4, batch, 12, D\] \(paths of a 3 x 4 image\)"
    ):
        frugax.kernels.merge_paths_2d(jnp.ones((4, 1, 6, 2)), 3, 4)
