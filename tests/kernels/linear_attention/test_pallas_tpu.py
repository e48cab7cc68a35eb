"""Linear attention's TPU kernels, interpreted: blocks, layouts, groups, gates."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.kernels.linear_attention import pallas_tpu, reference
from frugax.kernels.linear_attention.inputs import Inputs, check
from frugax.kernels.linear_attention.pallas_tpu_decay import levels, masked_sums
from frugax.kernels.linear_attention.tiling import Tiling, choose, vmem_bytes
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS, Case


def checked(case: Case) -> Inputs:
    arguments = OPERATIONS["linear_attention"].arguments(case)
    a = {name: jnp.asarray(x) for name, x in arguments.items()}
    names = ("q", "k", "v", "log_decay", "bonus", "initial_state", "segment_ids")
    return check(*(a.get(name) for name in names))


def results(case: Case, forward, backward):
    """(out, final_state) and the gradient of every float input, for fixed random cotangents."""
    call = checked(case)
    rng = np.random.default_rng(5)
    H, (B, T, _, V) = call.heads, call.v.shape
    d_out = jnp.asarray(rng.standard_normal((B, T, H, V)), call.v.dtype)
    d_state = jnp.asarray(rng.standard_normal((B, H, call.q.shape[3], V)), jnp.float32)
    return jax.jit(forward)(call), jax.jit(backward)(call, (d_out, d_state))


def definition(case: Case):
    """The same from the token-by-token definition in float64."""

    def wide(tree):
        return jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    def backward(call, cotangents):
        floats, runs = wide(call)._replace(runs=None), call.runs
        _, pullback = jax.vjp(lambda x: reference.forward(x._replace(runs=runs), 0.25), floats)
        return pullback(wide(cotangents))[0]

    with jax.enable_x64(True):
        out = results(case, lambda call: reference.forward(wide(call), 0.25), backward)
        return jax.tree.map(np.asarray, out)


def kernel(case: Case, tiling: Tiling):
    return results(
        case,
        partial(pallas_tpu.forward_tiled, scale=0.25, tiling=tiling, interpret=True),
        partial(pallas_tpu.backward_tiled, scale=0.25, tiling=tiling, interpret=True),
    )


@pytest.mark.parametrize("decay", [pytest.param("bth", marks=pytest.mark.full), "bthk"])
def test_blocks_do_not_change_the_answer(decay):
    """A chunk or a block longer than the sequence, many blocks, two heads a step or one: one answer."""
    case = {"T": 50, "decay": decay, "bonus": True, "state": True, "packed": True, "B": 1, "K": 8, "V": 8}
    want = definition(case)
    for tiling in (Tiling(16, 16, 2), Tiling(64, 64, 1)):
        assert_close(kernel(case, tiling), want, "float32", name=str(tiling))


@pytest.mark.parametrize(
    ("dtype", "T", "tiling"),
    [
        ("bfloat16", 21, Tiling(16, 16, 8)),
        *(pytest.param(d, 37, Tiling(16, 32, 8), marks=pytest.mark.full) for d in ("float32", "bfloat16")),
    ],
)
def test_eight_heads_are_read_as_they_lie_in_memory(dtype, T, tiling):
    """Eight heads of 128 lanes, told apart inside the kernel, with a last block that hangs over the end."""
    case = {
        "T": T,
        "heads": (8, 8, 8),
        "K": 128,
        "V": 128,
        "B": 1,
        "decay": "bth",
        "packed": True,
        "dtype": dtype,
    }
    assert_close(kernel(case, tiling), definition(case), dtype)


@pytest.mark.full
def test_eight_heads_with_a_decay_a_channel():
    case = {"T": 20, "heads": (8, 8, 8), "K": 128, "V": 128, "B": 1, "decay": "bthk", "dtype": "bfloat16"}
    forward = partial(pallas_tpu.forward_tiled, scale=0.25, tiling=Tiling(16, 32, 8), interpret=True)
    got, _ = results(case, forward, lambda call, cotangents: cotangents)
    want, _ = definition(case)
    assert_close(got, want, "bfloat16")


@pytest.mark.full
@pytest.mark.parametrize("heads", [(4, 2, 1), (1, 1, 10)])
def test_grouped_heads(heads):
    """Some of a grid step's heads share one of q's, k's or v's; or all do, and the next step's too."""
    case = {"T": 20, "heads": heads, "decay": "bth", "state": True, "K": 8, "V": 8}
    call = checked(case)
    tiling = Tiling(16, 32, choose(call, backward=True).heads)
    assert_close(kernel(case, tiling), definition(case), "float32")


@pytest.mark.full
@pytest.mark.parametrize("decay", ["bth", "bthk"])
@pytest.mark.parametrize("mildest", [-1e-4, -50])
def test_strong_gates(decay, mildest):
    """Gates down to -50 beside -1e-4, and -50 alone, where no term of d log_decay is above e^-50."""
    case = {
        "T": 200,
        "decay": decay,
        "mildest": mildest,
        "strongest": -50.0001,
        "B": 1,
        "heads": (1, 1, 1),
        "K": 8,
        "V": 8,
    }
    assert_close(kernel(case, Tiling(32, 64, 1)), definition(case), "float32")


def test_decay_levels_part_every_pair_once():
    """A pair's weight is found at its highest differing bit's level: the product of the decays between."""
    C, K = 32, 3

    def tree(decay):
        found, whole, total = levels(decay, None, bonus=False)
        return [(x.read, x.write) for x in found], (whole.read, whole.write), total

    decay = np.random.default_rng(0).uniform(0.2, 1, (C, K)).astype(np.float32)
    found, whole, total = jax.jit(tree)(decay)
    for i in range(C):
        np.testing.assert_allclose(whole[0][i], decay[: i + 1].prod(0), rtol=1e-5)
        np.testing.assert_allclose(whole[1][i], decay[i + 1 :].prod(0), rtol=1e-5)
        for j in range(i):
            read, write = found[(i ^ j).bit_length() - 1]
            np.testing.assert_allclose(read[i] * write[j], decay[j + 1 : i + 1].prod(0), rtol=1e-5)
    np.testing.assert_allclose(total[0], decay.prod(0), rtol=1e-5)


def test_masked_sums_keep_float32():
    x = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    mask = np.arange(128)[:, None] <= np.arange(128)
    assert_close(
        masked_sums(jnp.asarray(x), jnp.asarray(mask)), x.astype(np.float64) @ mask, "float32", times=0.1
    )


def test_a_state_too_large_for_vmem_is_refused_with_its_sizes():
    x = jax.ShapeDtypeStruct((1, 128, 8, 2048), jnp.float32)
    reason = pallas_tpu.unsupported_reason(Inputs(x, x, x, None, None, None, None))
    assert "2048" in reason
    assert "MiB" in reason


def test_the_vmem_of_features_is_that_of_the_chunks_that_run():
    """Chunks of features have 128 tokens, of short calls too."""

    def reason(T, V):
        x, v = (jax.ShapeDtypeStruct((1, T, 1, width), jnp.bfloat16) for width in (64, V))
        return pallas_tpu.unsupported_reason(Inputs(x, x, v, None, None, None, None), "taylor")

    assert reason(1, 128) is reason(128, 128) is None
    assert reason(1, 256) == reason(128, 256)
    assert "48 MiB" in reason(1, 256)


def test_blocks_shrink_until_they_fit():
    def largest(width):
        x = jax.ShapeDtypeStruct((1, 4096, 8, width), jnp.bfloat16)
        call = Inputs(x, x, x, jax.ShapeDtypeStruct(x.shape, jnp.float32), None, None, None)
        tiling = choose(call, backward=True)
        assert tiling.block % tiling.chunk == 0
        return tiling.block, vmem_bytes(call, tiling, backward=True)

    assert largest(256)[0] <= largest(128)[0]
