"""Each optimizer against its paper's algorithm, written out in NumPy, float64, over 50 steps.

A singular vector's sign is free. It means nothing to an update, but GaLore's moments live on past a refresh:
there the paper's algorithm is read as taking the sign that is nearer to the last vector.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import optim
from frugax.formats import quantize
from tests.errors import assert_close
from tests.optim.definitions import B1, B2, EPS, EVERY, RATE, STEPS, Adam, key_at, ours
from tests.optim.optimizers import gradients


def left_vectors(g, rank, last=None):
    """Singular vectors, each with that sign, of the two that it may have, which is nearer to the last one."""
    new = np.linalg.svd(g, full_matrices=False)[0][:, :rank]
    return new if last is None else np.where((new * last).sum(axis=0) < 0, -new, new)


@pytest.mark.parametrize("projector", ["svd", "gram"])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_galore(shape, projector):
    g, adam, expected, P = gradients(shape, STEPS), Adam(), [], None
    for t, G in enumerate(g):
        tall = shape[0] > shape[1]
        if t % EVERY == 0:
            P = left_vectors(G.T if tall else G, 3, P)
        if tall:
            expected.append(-RATE * 0.25 * adam(G @ P) @ P.T)
        else:
            expected.append(-RATE * 0.25 * P @ adam(P.T @ G))
    got = ours(lambda: optim.galore(RATE, rank=3, update_interval=EVERY, projector=projector), g)
    assert_close(got, np.stack(expected), "float64")


def gaussian(m, rank, step, path="kernel"):
    """The random matrix [rank, m] that the optimizer draws at `step`."""
    with jax.enable_x64(True):
        p = optim.Gaussian(rank)
        return np.asarray(p.down(jnp.eye(m), (), key_at(p, path, step)))


@pytest.mark.parametrize(("name", "rank", "scale"), [("apollo", 3, 1.0), ("apollo_mini", 1, 128**0.5)])
def test_apollo(name, rank, scale):
    g, adam, expected, before = gradients((5, 7), STEPS), Adam(), [], 0
    g[20:] *= 30  # a jump that the limiter must hold back
    for t, G in enumerate(g):
        R = gaussian(5, rank, t) @ G
        axis = 0 if name == "apollo" else None
        s = np.linalg.norm(adam(R), axis=axis) / np.linalg.norm(R, axis=axis)
        update = G * s
        if before and np.linalg.norm(update) > 1.01 * before:
            update *= 1.01 * before / np.linalg.norm(update)
        before = np.linalg.norm(update)
        expected.append(-RATE * scale * update)
    got = ours(lambda: getattr(optim, name)(RATE, rank=rank, update_interval=EVERY), g)
    assert_close(got, np.stack(expected), "float64")


def test_natural_galore():
    g, adam, expected, past = gradients((5, 7), STEPS), Adam(eps=1e-6), [], []
    P = None
    for t, G in enumerate(g):
        if t % EVERY == 0:
            P = left_vectors(G, 3, P)
        past = [*past, (P.T @ G).ravel()][-4:]
        H = np.stack(past, axis=1)
        fisher = 0.01 * np.eye(21) + H @ H.T  # dense, where ours solves for four unknowns
        expected.append(-RATE * P @ adam(np.linalg.solve(fisher, past[-1]).reshape(3, 7)))
    make = lambda: optim.natural_galore(  # noqa: E731
        RATE, rank=3, update_interval=EVERY, scale=1.0, history=4, damping=0.01
    )
    assert_close(ours(make, g), np.stack(expected), "float64")


def test_fira():
    g, adam, expected, before = gradients((5, 7), STEPS), Adam(), [], 0
    P = None
    for t, G in enumerate(g):
        if t % EVERY == 0:
            P = left_vectors(G, 3, P)
        R = P.T @ G
        psi = adam(R)
        S = (G - P @ R) * np.linalg.norm(psi, axis=0) / np.linalg.norm(R, axis=0)
        if before and np.linalg.norm(S) > 1.01 * before:
            S *= 1.01 * before / np.linalg.norm(S)
        before = np.linalg.norm(S)
        expected.append(-RATE * 0.25 * (P @ psi + S))
    got = ours(lambda: optim.fira(RATE, rank=3, update_interval=EVERY), g)
    assert_close(got, np.stack(expected), "float64")


def drawn(projector, shape, step, path="kernel"):
    """The entries of a matrix that Adam sees at `step`."""
    with jax.enable_x64(True):
        key, ones = key_at(projector, path, step), jnp.ones(shape)
        return np.asarray(projector.up(projector.down(ones, (), key), shape, (), key)) > 0


@pytest.mark.parametrize(("name", "make"), [("columns", optim.Rows), ("coordinates", optim.Coordinates)])
def test_frugal(name, make):
    g, expected = gradients((5, 7), STEPS), []
    chosen = set()
    for t, G in enumerate(g):
        if t % EVERY == 0:
            adam, seen = Adam(), drawn(make(rank=2), (5, 7), t)  # statistics start anew
            assert (seen.sum(axis=0) == 2).all()
            chosen.add(seen.tobytes())
        expected.append(-RATE * np.where(seen, adam(np.where(seen, G, 0)), 0.5 * np.sign(G)))
    assert len(chosen) > 3
    got = ours(
        lambda: optim.frugal(RATE, rank=2, update_interval=EVERY, projector=name, residual_scale=0.5), g
    )
    assert_close(got, np.stack(expected), "float64")
    assert (np.linalg.matrix_rank(got) > 2).all()  # than what Adam sees


def test_frugal_with_a_random_subspace():
    """Orthonormal: what Adam doesn't see is orthogonal to what it sees, and its signs are of that."""
    g, expected, bases = gradients((5, 7), STEPS), [], []
    for t, G in enumerate(g):
        if t % EVERY == 0:
            adam = Adam()
            with jax.enable_x64(True):
                p = optim.RandomBasis(rank=2)
                key = key_at(p, "kernel", t)
                P = np.asarray(p.refresh(jnp.asarray(G), p.init((5, 7), jnp.float64), key))
            assert_close(P.T @ P, np.eye(2), "float64")
            bases.append(P)
        R = P.T @ G
        expected.append(-RATE * (P @ adam(R) + np.sign(G - P @ R)))
    spanned = np.linalg.svd(np.concatenate(bases, axis=1), compute_uv=False)
    assert spanned.min() > 0.5  # another subspace each time
    got = ours(lambda: optim.frugal(RATE, rank=2, update_interval=EVERY, projector="random"), g)
    assert_close(got, np.stack(expected), "float64")


@pytest.mark.parametrize("name", ["columns", "coordinates", "random", "svd"])
def test_frugal_at_its_ends(name):
    g = gradients((5, 7), 10)
    adam = Adam()
    make = lambda density: lambda: optim.frugal(RATE, density=density, projector=name)  # noqa: E731
    assert_close(ours(make(0.0), g), -RATE * np.sign(g), "float64")
    if name in ("columns", "coordinates"):  # in a basis of its own Adam is another optimizer
        assert_close(ours(make(1.0), g), np.stack([-RATE * adam(G) for G in g]), "float64")


def cosines(m):
    k, i = np.arange(m), np.arange(m)[:, None]
    return np.where(k == 0, m**-0.5, (2 / m) ** 0.5) * np.cos(np.pi * (2 * i + 1) * k / (2 * m))


@pytest.mark.parametrize("rank", [3, 5])
def test_dct_adamw(rank):
    """At full rank, AdamW in the basis of cosines."""
    g, expected, D = gradients((5, 7), STEPS), [], cosines(5)
    assert_close(D.T @ D, np.eye(5), "float64")
    m, v, changes, before = np.zeros((5, 7)), np.zeros((5, 7)), 0, None
    for t, G in enumerate(g):
        S = D.T @ G
        chosen = np.zeros((5, 1), bool)
        chosen[np.argsort(-np.linalg.norm(S, axis=1))[:rank]] = True
        changes += before is not None and (chosen != before).any()
        before = chosen
        m = np.where(chosen, B1 * m + (1 - B1) * S, 0)  # what is not chosen is forgotten
        v = np.where(chosen, B2 * v + (1 - B2) * S * S, 0)
        expected.append(-RATE * D @ (m / (1 - B1 ** (t + 1)) / (np.sqrt(v / (1 - B2 ** (t + 1))) + EPS)))
    assert (changes > 5) == (rank < 5)
    assert_close(ours(lambda: optim.dct_adamw(RATE, rank=rank), g), np.stack(expected), "float64")


def rounded(codes, x, format, axis):
    """True if codes are x, rounded as well as the format can; near a tie, either way is as well."""
    stored = quantize(jnp.asarray(x, jnp.float32), format, axis=axis, group_size=256).dequantize()
    return (np.abs(codes - x) <= np.abs(np.asarray(stored) - x) + 1e-5 * np.abs(x).max()).all()


def test_dct_adamw_with_error_feedback():
    """Each step starts from the codes of the error that ours has before it."""
    g, D = gradients((5, 7), STEPS).astype(np.float32), cosines(5)
    opt = optim.dct_adamw(RATE, rank=3, error_feedback="int8")

    def step(state, g):
        updates, state = opt.update({"kernel": g}, state)
        return state, (updates["kernel"], state[0].leaves["kernel"].residual.dequantize())

    state = opt.init({"kernel": jnp.zeros((5, 7))})
    updates, errors = jax.jit(lambda g: jax.lax.scan(step, state, g)[1])(jnp.asarray(g))
    E, m, v = np.zeros((5, 7)), np.zeros((5, 7)), np.zeros((5, 7))
    for t, G in enumerate(g.astype(np.float64)):
        A = G + E
        S = D.T @ A
        chosen = np.zeros((5, 1), bool)
        chosen[np.argsort(-np.linalg.norm(S, axis=1))[:3]] = True
        m = np.where(chosen, B1 * m + (1 - B1) * S, 0)
        v = np.where(chosen, B2 * v + (1 - B2) * S * S, 0)
        u = m / (1 - B1 ** (t + 1)) / (np.sqrt(v / (1 - B2 ** (t + 1))) + EPS)
        # Adam's 1 - b2^t is rounded to eps / 2 of 1, at first where it is 0.001; its root halves that: 3e-5.
        assert_close(updates[t], -RATE * D @ u, "float32", times=4)
        E = np.asarray(errors[t], np.float64)
        assert rounded(E, A - D @ np.where(chosen, S, 0), "int8", 1)
    assert np.abs(E).max() > 0.1


def newton_schulz(x):
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_trion(shape):
    g, expected, M = gradients(shape, STEPS), [], np.zeros((5, 7))
    D, tall = cosines(5), shape[0] > shape[1]
    gain = 1.0 if tall else (7 / 5) ** 0.5  # inputs x outputs
    for G in g:
        B = M + (G.T if tall else G)
        S = D.T @ B
        Q = D[:, np.sort(np.argsort(-np.linalg.norm(S, axis=1))[:3])]
        b = Q.T @ B
        M = B - (1 - 0.9) * Q @ b
        update = -RATE * gain * Q @ newton_schulz(b)
        expected.append(update.T if tall else update)
    got = ours(lambda: optim.trion(RATE, rank=3, momentum=0.9), g)
    assert_close(got, np.stack(expected), "float64")


@pytest.mark.parametrize(("rank", "nesterov"), [(2, True), (2, False), (5, True)])
def test_cosmos(rank, nesterov):
    """At full rank, Adam in the eigenbasis of the Gram matrix alone."""
    g, expected, b1, b2, gamma = gradients((5, 7), STEPS), [], 0.95, 0.95, 0.2
    U = left_vectors(g[0], rank)
    M, S, V, B = np.zeros((5, 7)), np.zeros((rank, rank)), np.zeros((rank, 7)), 0
    for t, G in enumerate(g, start=1):
        M = b1 * M + (1 - b1) * G
        N = (b1 * M + (1 - b1) * G) / (1 - b1 ** (t + 1)) if nesterov else M / (1 - b1**t)
        C = b2 * U @ S @ U.T + (1 - b2) * G @ G.T
        U = np.linalg.qr(C @ U)[0]
        S = U.T @ C @ U
        V = b2 * V + (1 - b2) * (U.T @ G) ** 2
        A = U @ (U.T @ N / np.sqrt((V + EPS) / (1 - b2**t)))
        if rank < 5:
            B = newton_schulz(N - U @ U.T @ N)
            B *= np.sqrt(35) / np.linalg.norm(B)
        X = A + gamma * B
        expected.append(-RATE * np.sqrt(5) * X / np.linalg.norm(X))
    got = ours(lambda: optim.cosmos(RATE, rank=rank, nesterov=nesterov), g)
    assert_close(got, np.stack(expected), "float64")
    assert_close(np.linalg.norm(got, axis=(1, 2)), np.full(STEPS, RATE * 5**0.5), "float64")


def test_cosmos_finds_the_leading_eigenspace():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    g = Q @ np.diag([9.0, 6.0, 1.0, 0.5, 0.1]) @ rng.normal(size=(400, 5, 7))
    with jax.enable_x64(True):
        opt = optim.cosmos(RATE, rank=2, b2=0.99)
        state = opt.init({"kernel": jnp.zeros((5, 7))})
        step = lambda state, g: (opt.update({"kernel": g}, state)[1], None)  # noqa: E731
        U = np.asarray(
            jax.jit(lambda s, g: jax.lax.scan(step, s, g)[0])(state, jnp.asarray(g))[0].leaves["kernel"].basis
        )
    assert_close(U.T @ U, np.eye(2), "float64")
    assert np.linalg.norm(Q[:, :2].T @ U) ** 2 > 2 - 0.02  # both directions, within a hundredth each


def test_q_galore():
    """GaLore with codes for P and the moments; each step starts from the codes that ours has before it."""
    g = gradients((5, 7), STEPS).astype(np.float32)
    opt = optim.q_galore(RATE, rank=3, update_interval=3, threshold=0.65, min_size=1)

    def step(state, g):
        updates, state = opt.update({"kernel": g}, state)
        leaf = state[0].leaves["kernel"]
        moments = leaf.inner.mu.dequantize(), leaf.inner.nu.dequantize()
        return state, (updates["kernel"], leaf.projector.dequantize(), *moments, leaf.waiting.next)

    state = opt.init({"kernel": jnp.zeros((5, 7))})
    trace = jax.jit(lambda g: jax.lax.scan(step, state, g)[1])(jnp.asarray(g))
    updates, bases, means, squares, following = (np.asarray(x, np.float64) for x in trace)

    P, m, v = np.zeros((5, 3)), np.zeros((3, 7)), np.zeros((3, 7))
    wait, upcoming, similarities, refreshes = 3, 0, [], 0
    for t, G in enumerate(g.astype(np.float64)):
        if t == upcoming:
            refreshes += 1
            new = left_vectors(G, 3, P if t else bases[0])  # the first signs are free
            if t:
                similarities.append(abs(P[:, 0] @ new[:, 0]) / np.linalg.norm(P[:, 0]))
            if len(similarities) >= 5 and np.mean(similarities[-5:]) >= 0.65:
                wait *= 2
            upcoming = t - t % wait + wait
            assert rounded(bases[t], new, "int4", 0)
            P = bases[t]
        assert following[t] == upcoming
        np.testing.assert_array_equal(bases[t], P)
        R = P.T @ G
        m, v = B1 * m + (1 - B1) * R, B2 * v + (1 - B2) * R * R
        u = m / (1 - B1 ** (t + 1)) / (np.sqrt(v / (1 - B2 ** (t + 1))) + EPS)
        # Adam's 1 - b2^t is rounded to eps / 2 of 1, at first where it is 0.001; its root halves that: 3e-5.
        assert_close(updates[t], -RATE * 0.25 * P @ u, "float32", times=4)
        assert rounded(means[t], m, "dynamic8", 1)
        assert rounded(squares[t], v, "udynamic8", 1)
        m, v = means[t], squares[t]
    assert 5 < refreshes < 14  # some intervals doubled, and some did not
