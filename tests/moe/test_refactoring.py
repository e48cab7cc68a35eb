"""Dense layers cut into experts by neurons: unions are the dense layer, experts are parts of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax import moe
from tests.errors import assert_close, error

D, H, T = 12, 40, 64
RNG = np.random.default_rng(0)
LAYERS = {
    "GLU": frugax.layers.GLU(expand=H / D),
    "MLP": frugax.layers.MLP(expand=H / D, activation="relu"),
}
# Two domains, each in directions of its own and a few of both.
DOMAINS = jnp.asarray(
    RNG.standard_normal((2, T, D)) * (np.arange(D) % 3 != np.array([[[0]], [[1]]])), jnp.float32
)


@functools.cache
def dense(kind):
    return jax.jit(LAYERS[kind].init)(jax.random.key(0), DOMAINS)["params"]


def hidden(kind, params, x) -> np.ndarray:
    """The activations of all neurons."""
    x, p = np.asarray(x, np.float64), jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    if kind == "MLP":
        return np.maximum(x @ p["in"]["kernel"], 0)
    gate, value = np.split(x @ p["gate_in"]["kernel"], 2, -1)
    return gate / (1 + np.exp(-gate)) * value


def mixture(kind, split, x, chosen):
    """The split layer with weights of 1 for the chosen experts [tokens, k]."""
    width = split["experts"]["out"]["kernel"].shape
    shared = split["shared"]["out"]["kernel"].shape[0] / D if "shared" in split else 0
    layer = frugax.layers.MoE(
        experts=width[0], k=1, expert=kind, expand=width[1] / D, shared_expand=shared,
        activation=LAYERS[kind].activation, dispatch="dense",
    )  # fmt: skip
    n, k = chosen.shape
    logits = np.zeros((n, width[0]), np.float32)
    logits[np.arange(n)[:, None], chosen] = 9

    @jax.jit
    def run(split, logits, x):
        routing = moe.softmax_top_k(logits, k, scale=float(k))  # of equal logits: weights of 1
        return layer.apply({"params": split}, x, routing=routing)

    return run(split, logits, x)


@pytest.mark.parametrize("kind", ["GLU", pytest.param("MLP", marks=pytest.mark.full)])
def test_the_union_of_all_neurons_is_the_dense_layer(kind):
    """All experts of disjoint subsets of odd sizes, and two that overlap in what is shared."""
    params, x = dense(kind), DOMAINS
    want = jax.jit(LAYERS[kind].apply)({"params": params}, x)
    owner = RNG.permutation(np.repeat([0, 1, 2], [7, 13, 20]))
    three = moe.split_neurons(params, owner == np.arange(3)[:, None])
    rank = RNG.permutation(H).astype(np.float32)  # what one domain uses most the other uses least
    two, subsets = moe.split_by_activation(params, np.stack([rank, H - rank]), 0.8)
    assert subsets.any(0).all()
    assert three["experts"]["out"]["kernel"].shape == (3, 24, D)
    assert two["shared"]["out"]["kernel"].shape == (24, D)
    for split, experts in ((three, 3), (two, 2)):
        every = np.broadcast_to(np.arange(experts), (2 * T, experts))
        assert_close(mixture(kind, split, x, every), want, "float32")


@pytest.mark.parametrize("kind", ["GLU", pytest.param("MLP", marks=pytest.mark.full)])
def test_an_expert_with_the_shared_one_is_its_subset(kind):
    """And better for its domain than as many neurons at random, or the other domain's."""
    params, x = dense(kind), DOMAINS
    activations = hidden(kind, params, x)
    out = np.asarray(params["out"]["kernel"], np.float64)
    statistics = [
        frugax.quant.calibrate(LAYERS[kind], {"params": params}, [jnp.asarray(batch[None])], only="out")
        for batch in np.asarray(x)
    ]
    activity = np.stack([found["out/kernel"].mean_abs for found in statistics])
    np.testing.assert_allclose(activity, np.abs(activations).mean(1), rtol=1e-4)
    split, subsets = moe.split_by_activation(params, activity, 0.5)
    assert (subsets.sum(1) == H // 2).all()
    assert 0 < subsets.all(0).sum() < H // 2  # some are shared
    for strong, row in zip(activity, subsets, strict=True):
        assert strong[row].min() >= strong[~row].max()
    domain = np.repeat(np.arange(2), T)[:, None]
    y = mixture(kind, split, x, domain)
    assert_close(y, (activations * subsets[:, None]) @ out, "float32")

    whole = activations @ out
    mine = error(y, whole)
    swapped = error((activations * subsets[::-1, None]) @ out, whole)
    random = [error((activations * (RNG.permuted(np.arange(H) < H // 2))) @ out, whole) for _ in range(20)]
    assert mine < 0.8 * np.mean(random)
    assert mine < 0.8 * swapped


def test_overlap_tells_domains():
    """The counts by loops, and labels for a router: most tokens' neurons are those of their domain."""
    params = dense("GLU")
    activations = np.abs(hidden("GLU", params, DOMAINS))
    _, subsets = moe.split_by_activation(params, activations.mean(1), 0.5)
    got = jax.jit(lambda a: moe.activation_overlap(a, subsets))(activations.astype(np.float32))
    own = subsets & ~subsets.all(0)
    N = own[0].sum()
    assert 0 < N < subsets[0].sum()
    want = np.zeros((2, T, 2))
    for at in np.ndindex(2, T):
        order = np.argsort(-activations[at])
        for level in (0.2, 0.4, 0.6, 0.8, 1.0):
            want[at] += own[:, order[: int(level * N)]].sum(1) / N / 5
    np.testing.assert_allclose(got, want, rtol=1e-5)
    shared_or_not = jax.jit(lambda a: moe.activation_overlap(a, own))(activations.astype(np.float32))
    np.testing.assert_array_equal(shared_or_not, got)
    label = np.asarray(got).argmax(-1)
    assert (label == [[0], [1]]).mean() > 0.5 + 3 * np.sqrt(0.25 / (2 * T))  # far from chance


def test_distillation_is_the_authors_two_losses():
    """Three quarters a cross entropy smoothed by a half, and a quarter one with soft labels, by loops."""
    overlap, logits = RNG.uniform(0, 1, (2, 5, 3)), RNG.standard_normal((5, 3))
    mask = np.arange(5) < 4
    want = []
    for layer, t in np.ndindex(2, 4):
        log_p = logits[t] - np.log(np.exp(logits[t]).sum())
        centred = 10 * (5 / 3) * (overlap[layer, t] - overlap.mean())  # five levels, over 3 N, in their code
        soft = np.exp(centred) / np.exp(centred).sum()
        smoothed = 0.5 * log_p[overlap[layer, t].argmax()] + 0.5 * log_p.mean()
        want.append(-0.75 * smoothed - 0.25 * (soft * log_p).sum())
    run = jax.jit(jax.value_and_grad(moe.router_distillation, argnums=(0, 1)))
    given = [jnp.asarray(x, jnp.float32) for x in (logits, overlap)]
    given = [x.at[..., 4, :].set(jnp.nan) for x in given]  # what is left out may be anything
    loss, (grad, none) = run(*given, mask)
    np.testing.assert_allclose(loss, np.mean(want), rtol=1e-5)
    assert not np.asarray(none).any()
    assert np.asarray(grad)[:4].any(1).all()
    assert not np.asarray(grad)[4].any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: moe.split_by_activation(p, np.ones((2, H)), 0.0), "keep: got 0.0"),
        (lambda p: moe.split_by_activation(p, np.full((2, H), np.nan), 0.5), r"activity: got \[2, 40\]"),
        (lambda p: moe.split_by_activation(p, np.ones((2, 9)), 0.5), r"subsets: got bool\[2, 9\]; expected"),
        (lambda p: moe.split_neurons(p, np.zeros((2, H), bool)), "with a neuron for each expert"),
        (lambda p: moe.split_neurons(p, np.ones((2, H))), r"subsets: got float64\[2, 40\]"),
        (
            lambda p: moe.activation_overlap(jnp.ones((3, 9)), np.ones((2, H), bool)),
            r"subsets: got \[2, 40\]",
        ),
        (
            lambda p: moe.activation_overlap(jnp.ones((3, H)), np.ones((2, H), bool)),
            "subsets: got a first expert without neurons of its own",
        ),
        *(
            (
                lambda p, levels=levels: moe.activation_overlap(
                    jnp.ones((3, H)), np.eye(2, H, dtype=bool), levels=levels
                ),
                r"levels: got \[.*\] of 1 neurons; expected numbers above 0",
            )
            for levels in ((), (-1.0,), (H + 1.0,))
        ),
        (
            lambda p: moe.router_distillation(jnp.ones((3, 2)), jnp.ones((4, 5, 2))),
            r"overlap: got \[4, 5, 2\]; expected \[..., 3, 2\]",
        ),
        (
            lambda p: moe.router_distillation(jnp.ones((3, 2)), jnp.ones((3, 2)), jnp.ones(4, bool)),
            r"mask: got \[4\]; expected \[3\]",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call(dense("GLU"))
