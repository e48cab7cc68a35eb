"""WeLore against its definition in NumPy: which ranks, what is stored, what is trained, what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax.optim import MatrixAxes, MatrixSpec, state_bytes
from frugax.peft import welore_merge, welore_ranks, welore_split
from tests.errors import assert_close
from tests.optim.optimizers import language, logits, params


def numbers(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def spectra(*lengths, m=12, n=9):
    """A stack of matrices whose singular values fall off over these lengths, each of its own size."""
    rng = np.random.default_rng(0)
    made = []
    for i, length in enumerate(lengths):
        u, v = (np.linalg.qr(rng.normal(size=(side, n)))[0] for side in (m, n))
        made.append(10.0**i * (u * np.exp(-np.arange(n) / length)) @ v.T)
    return jnp.asarray(np.stack(made), jnp.float32)


@pytest.mark.parametrize("reduction", [0.0, 0.3, 0.5, 0.8])
def test_ranks_are_one_thresholds(reduction):
    tree = {"layers": {"kernel": spectra(1, 4, 30)}, "out": {"kernel": spectra(9)[0].T}}
    ranks = welore_ranks(tree, reduction)
    s = [np.linalg.svd(w, compute_uv=False) for w in (*tree["layers"]["kernel"], tree["out"]["kernel"])]
    s = [(x - x[-1]) / (x[0] - x[-1]) for x in s]
    threshold = np.sort(np.concatenate(s))[round(reduction * 36)] - 1e-5  # it is one of the values itself
    want = [int((x >= threshold).sum()) for x in s]
    assert [*ranks["layers/kernel"], *ranks["out/kernel"]] == want
    assert abs(sum(want) - (1 - reduction) * 36) <= 1
    if reduction == 0.5:
        assert want[0] < want[1] < want[2]  # of the first, which falls off fastest, most is cut


def test_a_matrix_without_a_tail_keeps_its_rank():
    """Equal singular values go together; of others the smallest goes first."""
    tree = {
        "w": jnp.stack([2 * jnp.eye(3, 5), jnp.zeros((3, 5)), jnp.diag(jnp.array([3.0, 2.0, 1.0]), 2)[:3]])
    }
    assert welore_ranks(tree, 0.25) == {"w": (3, 3, 1)}


def test_what_is_low_is_its_best_approximation_and_the_rest_is_itself():
    tree = {"layers": {"kernel": spectra(1, 4, 30)}, "bias": jnp.arange(3.0)}
    trained, rest = welore_split(tree, {"layers/kernel": (2, 4, 5)})
    assert list(trained) == ["layers/kernel"]
    assert trained["layers/kernel"].places == (0, 1)  # 5 is not below half of 9
    np.testing.assert_array_equal(rest["layers"]["kernel"], tree["layers"]["kernel"][2:])
    assert numbers(trained) == (2 + 4) * (12 + 9)
    merged = welore_merge(trained, rest)
    np.testing.assert_array_equal(merged["bias"], tree["bias"])
    np.testing.assert_array_equal(merged["layers"]["kernel"][2], tree["layers"]["kernel"][2])
    for i, rank in ((0, 2), (1, 4)):
        u, s, vt = np.linalg.svd(np.asarray(tree["layers"]["kernel"][i], np.float64), full_matrices=False)
        want = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert_close(merged["layers"]["kernel"][i], want, "float32", times=2)  # a decomposition and a product
    whole = welore_split(tree, welore_ranks(tree, 0.0), low=1.0)
    assert whole[0] == {}
    jax.tree.map(np.testing.assert_array_equal, welore_merge(*whole), tree)


def test_any_axes_and_dtypes():
    w = jnp.moveaxis(spectra(1, 2), 0, -1).reshape(12, 3, 3, 2).astype(jnp.bfloat16)
    spec = MatrixSpec(rules={"w": MatrixAxes(rows=(0,), cols=(1, 2))})
    trained, rest = welore_split({"w": w}, {"w": (4, 4)}, spec=spec)
    assert {x.dtype for x in jax.tree.leaves((trained, rest))} == {jnp.dtype(jnp.bfloat16)}
    assert rest["w"].shape == (0, 12, 9)
    merged = welore_merge(trained, rest)["w"]
    assert merged.shape == w.shape
    # Of the slower spectrum exp(-i / 2) the fifth value on: exp(-2) of the whole, and 2^-9 for rounding.
    for i in range(2):
        exact = np.asarray(w[..., i], np.float64)
        assert np.linalg.norm(merged[..., i] - exact) < (0.14 + 0.01) * np.linalg.norm(exact)


def test_a_language_model_keeps_more_than_at_one_rank_and_its_low_part_learns_it_back():
    text, _, _ = language()

    @jax.jit
    def loss(tree):
        scores = logits(tree, text[:-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, text[1:]))

    def train(loss, tree, steps, tx):
        def step(carry, _):
            tree, state = carry
            updates, state = tx.update(jax.grad(loss)(tree), state, tree)
            return (optax.apply_updates(tree, updates), state), None

        return jax.jit(lambda t: jax.lax.scan(step, (t, tx.init(t)), length=steps)[0])(tree)

    # Small at first, and decaying: what is large was learnt.
    start = jax.tree.map(lambda x: np.float32(0.3) * np.asarray(x), params())
    tree, state = train(loss, start, 300, optax.adamw(0.02, weight_decay=0.1))
    whole = float(loss(tree))

    trained, rest = welore_split(tree, welore_ranks(tree, 0.5))
    uniform = welore_split(tree, {"layers/kernel": (10, 10), "out/kernel": (14,)}, low=1.0)
    assert numbers((trained, rest)) <= numbers(uniform) < numbers(tree)
    merged = jax.jit(lambda trained, rest: loss(welore_merge(trained, rest)))
    cut = float(merged(trained, rest))
    assert whole + 0.1 < cut < float(merged(*uniform)) - 0.5

    tuned, low_state = train(lambda t: loss(welore_merge(t, rest)), trained, 60, optax.adam(0.01))
    assert merged(tuned, rest) < whole + 0.2 * (cut - whole)
    assert state_bytes(low_state) < 0.5 * state_bytes(state)


def test_what_can_not_be_right_is_refused(unchecked_types):
    tree = {"w": spectra(1, 4)}
    with pytest.raises(ValueError, match="reduction: got 1"):
        welore_ranks(tree, 1.0)
    with pytest.raises(ValueError, match=r"ranks: got v; expected w"):
        welore_split(tree, {"v": (1, 1)})
    with pytest.raises(ValueError, match=r"ranks: got \(3,\) for w; expected 2 from 1 to 9"):
        welore_split(tree, {"w": (3,)})
    trained, rest = welore_split(tree, {"w": (1, 9)})
    with pytest.raises(ValueError, match=r"rest: got \[2, 12, 9\] at w; expected \[1, 12, 9\]"):
        welore_merge(trained, tree)
    with pytest.raises(ValueError, match="trained: got w; expected paths of rest"):
        welore_merge(trained, {"v": rest["w"]})
