"""Linear attention's Mosaic GPU kernels: levels of token pairs, channel blocks, padding, limits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.kernels.linear_attention import pallas_gpu
from frugax.kernels.linear_attention import pallas_gpu_tiles as tiles
from frugax.kernels.linear_attention.inputs import check
from frugax.kernels.linear_attention.tiling_gpu import Tiling, choose
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS, expected, parts, value_and_gradients, widened

CHUNK, LEVELS = tiles.CHUNK, tiles.LEVELS
ROW = OPERATIONS["linear_attention"]


def matrix(chosen) -> np.ndarray:
    return np.asarray(chosen.holds(jnp.broadcast_to(jnp.arange(CHUNK), (CHUNK, CHUNK))))


@pytest.mark.parametrize("exclusive", [False, True])
def test_levels_hold_every_pair_once_and_its_decay_in_two_factors(exclusive):
    """For i > j, one level has i as a query, j as a key, and their ranges make up the tokens j < s <= i."""
    tokens = jnp.arange(CHUNK)
    covered = np.zeros((CHUNK, CHUNK), int)
    for level in range(LEVELS):
        query = tiles.is_query(tokens, level)
        lower = matrix(tiles.only(query, tiles.opposite(tokens, level)))
        upper = matrix(tiles.only(~query, tiles.opposite(tokens, level)))
        np.testing.assert_array_equal(lower, upper.T)
        covered += lower
        reach = matrix(tiles.towards_border(tokens, level, exclusive)).astype(int)
        for i, j in zip(*np.nonzero(lower), strict=True):
            between = np.zeros(CHUNK, int)
            between[j + 1 : i if exclusive else i + 1] = 1
            np.testing.assert_array_equal(reach[i] + reach[j], between)
    np.testing.assert_array_equal(covered, np.tril(np.ones((CHUNK, CHUNK), int), -1))


def run(arguments: dict, K: int) -> tuple[tuple, dict]:
    """Values and gradients of the interpreted kernels alone, for the cotangents of `expected`.

    As in a call of the operation, kernels are traced without 64 bits.
    """
    names = ("q", "k", "v", "log_decay", "bonus", "initial_state", "segment_ids")
    scale = arguments.get("scale", K**-0.5)

    @jax.jit
    def both(call):
        out = pallas_gpu.forward(call, scale, interpret=True)
        rng = np.random.default_rng(7)
        weights = (rng.standard_normal(x.shape).astype(jnp.bfloat16) for x in out)
        cotangents = tuple(jnp.asarray(w, x.dtype) for w, x in zip(weights, out, strict=True))
        return out, pallas_gpu.backward(call, cotangents, scale, interpret=True)

    with jax.enable_x64(False):
        call = check(*(jnp.asarray(arguments[n]) if n in arguments else None for n in names))
        results, gradients = both(call)
    return results, {n: getattr(gradients, n) for n in parts(arguments)[0]}


@pytest.mark.parametrize(
    ("case", "tiling"),
    [
        pytest.param(
            {"T": 70, "B": 1, "heads": (1, 1, 1), "K": 128, "V": 128, "decay": "bthk", "dtype": "bfloat16"},
            Tiling(128, 128, 3),
            marks=pytest.mark.full,
        ),
        (
            {
                "T": 5,
                "B": 1,
                "heads": (2, 1, 1),
                "K": 80,
                "V": 40,
                "decay": "bth",
                "bonus": True,
                "dtype": "bfloat16",
            },
            Tiling(64, 64, 3),
        ),
        (
            {
                "T": 150,
                "B": 1,
                "heads": (2, 1, 1),
                "K": 128,
                "V": 64,
                "decay": "bth",
                "state": True,
                "packed": True,
                "dtype": "bfloat16",
            },
            Tiling(64, 64, 2, fused=True),
        ),
        pytest.param(  # gates that leave nothing of the past: each one's gradient is tiny, and right
            {
                "T": 100,
                "B": 1,
                "heads": (1, 1, 1),
                "K": 64,
                "V": 64,
                "decay": "bthk",
                "mildest": -40,
                "strongest": -50,
                "bonus": True,
                "state": True,
                "dtype": "bfloat16",
            },
            Tiling(64, 64, 2),
            marks=pytest.mark.full,
        ),
    ],
    ids=str,
)
def test_every_tiling_and_padded_sizes(monkeypatch, case, tiling):
    monkeypatch.setattr(pallas_gpu, "choose", lambda *_: tiling)
    results, gradients = run(ROW.arguments(case), case["K"])
    want_results, want_gradients = expected(ROW, case)
    assert_close(results, want_results, "bfloat16")
    assert_close(gradients, want_gradients, "bfloat16", name="d")


def test_a_gate_may_close_for_good():
    """log_decay = -inf in bfloat16: what came before is gone, and no gradient is a NaN."""
    arguments = ROW.arguments(
        {
            "T": 40,
            "B": 1,
            "heads": (1, 1, 1),
            "K": 64,
            "V": 64,
            "decay": "bthk",
            "state": True,
            "dtype": "bfloat16",
        }
    )
    gates = arguments["log_decay"].astype(jnp.bfloat16)
    gates[:, 20] = -np.inf
    (out, state), gradients = run(arguments | {"log_decay": gates}, 64)
    late = {n: x[:, 20:] if n != "initial_state" else np.zeros_like(x) for n, x in arguments.items()}
    late["log_decay"] = gates[:, 20:].astype(np.float32)
    late["log_decay"][:, 0] = 0  # nothing is left to decay
    with jax.enable_x64(True):
        want, _ = value_and_gradients(ROW, widened(late), "reference")
    assert_close((out[:, 20:], state), want, "bfloat16")
    assert gradients["log_decay"].dtype == jnp.bfloat16
    for gradient in gradients.values():
        assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_reasons_name_what_is_in_the_way():
    def reason(dtype, K, V, feature_map=None, decay=None):
        x, v = (jax.ShapeDtypeStruct((1, 8, 2, n), dtype) for n in (K, V))
        call = jax.eval_shape(partial(check, feature_map=feature_map), x, x, v, decay, *[None] * 3)
        return pallas_gpu.unsupported_reason(call, feature_map)

    assert reason(jnp.bfloat16, 64, 256) is None
    assert "bfloat16" in reason(jnp.float32, 64, 64)
    assert "32" in reason(jnp.bfloat16, 16, 64)
    assert reason(jnp.bfloat16, 18, 1, "taylor") is None
    assert "K is 19" in reason(jnp.bfloat16, 19, 64, "taylor")
    decay = jax.ShapeDtypeStruct((2,), jnp.float32)
    assert "log_decay" in reason(jnp.bfloat16, 16, 64, "taylor", decay)


def test_state_blocks_are_wide_only_where_programs_abound():
    assert choose(1, 96, 128, 128, per_channel=False).state_values == 128
    assert choose(1, 8, 128, 128, per_channel=False).state_values == 64
    assert choose(8, 96, 128, 192, per_channel=False).state_values == 64
    assert choose(1, 96, 128, 128, per_channel=True).state_values == 64
