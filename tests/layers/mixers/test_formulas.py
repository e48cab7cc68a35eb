"""Each mixer against its paper's equations in numpy: a loop over tokens, or the quadratic form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.layers.modules.rotary import angles
from frugax.layers.modules.token_shift import log_decay
from tests.errors import assert_close

from .mixers import TIME, WIDTH, make, whole

T, D = TIME, WIDTH


def together(name):
    """Run a test in the worker that compiles this mixer's call for test_mixers.py."""
    return pytest.mark.xdist_group(f"mixer {name}")


def call(name, **by_layer):
    """(the parameters as numpy, x [B, T, D], the mixer's y) in float64; `by_layer` goes to the call."""
    if not by_layer:
        return whole(name)[:3]
    with jax.enable_x64(True):
        module, variables, x = make(name)
        y, _ = jax.jit(module.apply)(variables, x, **by_layer)
        return jax.tree.map(np.asarray, (variables["params"], x, y))


def check(y, expected, dtype="float64"):
    assert_close(y, expected, dtype)


def heads(x, H):
    return x.reshape(*x.shape[:-1], H, -1)


def merge(x):
    return x.reshape(*x.shape[:-2], -1)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))  # 1 / (1 + exp(-x)), where that overflows too


def silu(x):
    return x * sigmoid(x)


def rms_norm(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def rotate(x_BTHD):
    """Pairs of channels as complex numbers, turned by position * 10000^(-2i/D)."""
    half = x_BTHD.shape[-1] // 2
    z = x_BTHD[..., :half] + 1j * x_BTHD[..., half:]
    angle = np.arange(x_BTHD.shape[1])[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    z = z * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def masked(q, k, v, weight_HTT):
    """(Q K^T * weight) V, head by head."""
    return np.einsum("bthk,bshk,hts,bshv->bthv", q, k, weight_HTT, v)


def decayed(gamma_H):
    """gamma^(t - s) for s <= t, else 0: [H, T, T]."""
    back = np.arange(T)[:, None] - np.arange(T)
    return np.where(back >= 0, gamma_H[:, None, None] ** np.maximum(back, 0), 0)


def recurrent(q, k, v, a, scale):
    """S = diag(a) S + k v^T and o = scale q S, token by token; all [B, T, H, .]."""
    B, _, H, K = q.shape
    S = np.zeros((B, H, K, v.shape[-1]))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for t in range(q.shape[1]):
        S = a[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        out[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return out


def features(name, x, p, which):
    if name == "elu+1":
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    if name == "learned":
        y = np.einsum("bthd,hde->bthe", x, p[which]["kernel"])
        e = np.exp(np.concatenate([y, -y], axis=-1))
        return e / e.sum(-1, keepdims=True)
    return x


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=together(f"LinearAttention-{name}"))
        for name in ("elu+1", "taylor", "learned", "sum")
    ],
)
def test_linear_attention(name):
    p, x, y = call(f"LinearAttention-{name}")
    H, V = 2, D // 2
    K = {"elu+1": 5, "taylor": 3}.get(name, V)
    q, k, v = (heads(z, H) for z in np.split(x @ p["qkv"]["kernel"], [H * K, 2 * H * K], axis=-1))
    q_f = features("elu+1" if name == "sum" else name, q, p, "q_map")
    k_f = features("elu+1" if name == "sum" else name, k, p, "k_map")
    weight = np.einsum("bthk,bshk->bhts", q_f, k_f)
    if name == "taylor":  # what exp(q.k / sqrt(K)) starts with
        dots = weight / np.sqrt(K)
        weight = 1 + dots + dots**2 / 2
    weight = np.tril(weight)
    total = np.sqrt(K) if name == "sum" else weight.sum(-1)[..., None] + 1e-6
    check(y, merge(np.moveaxis(weight @ np.moveaxis(v, 2, 1) / total, 1, 2)) @ p["out"]["kernel"])


def test_taylor_map_is_the_polynomial():
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((2, 100, 16))
    with jax.enable_x64(True):
        fx, fz = map(np.asarray, map(jax.jit(frugax.layers.taylor), (x, z)))
    assert fx.shape == (100, 1 + 16 + 16 * 17 // 2)
    dots = np.sum(x * z, axis=-1)
    assert_close(np.sum(fx * fz, axis=-1), 1 + dots + dots**2 / 2, "float64")


@pytest.mark.parametrize(
    ("name", "by_layer"),
    [
        pytest.param("LightningAttention", {}, marks=together("LightningAttention")),
        pytest.param("LightningAttention-lrpe", {"fraction": 0.75}),
    ],
)
def test_lightning_attention(name, by_layer):
    p, x, y = call(name, **by_layer)
    H, fraction = 2, by_layer.get("fraction", 0)
    q, k, v, u = np.split(x @ p["qkvu"]["kernel"], 4, axis=-1)
    q, k, v = heads(silu(q), H), heads(silu(k), H), heads(v, H)
    if name.endswith("lrpe"):
        angle = np.arange(T)[:, None, None] * p["theta"]
        q, k = (np.concatenate([z * np.cos(angle), z * np.sin(angle)], axis=-1) for z in (q, k))
    slopes = np.array([2**-4, 2**-8])  # ALiBi's of 2 heads
    o = masked(q, k, v, decayed(np.exp(-slopes * (1 - fraction + 1e-5))))
    check(y, (u * rms_norm(merge(o))) @ p["out"]["kernel"])


def test_slopes_of_eight_heads_are_alibis():
    assert frugax.layers.decay_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert frugax.layers.decay_slopes(3).tolist() == [
        2.0**-4,
        2.0**-8,
        2.0**-2,
    ]  # of 2 heads; of 4, the first
    with pytest.raises(ValueError, match="heads: got 0"):
        frugax.layers.decay_slopes(0)


@together("Retention")
def test_retention():
    p, x, y = call("Retention")
    H = 2
    q, k, v, g = np.split(x @ p["qkv_gate"]["kernel"], [D, 2 * D, 4 * D], axis=-1)
    o = masked(rotate(heads(q, H)), rotate(heads(k, H)), heads(v, H), decayed(1 - 2.0 ** (-5 - np.arange(H))))
    check(y, merge(rms_norm(o / np.sqrt(D // H)) * silu(heads(g, H))) @ p["out"]["kernel"])


@together("GatedLinearAttention")
def test_gated_linear_attention():
    p, x, y = call("GatedLinearAttention")
    H = 2
    sizes = np.cumsum([D // 2, D // 2, D, D])
    q, k, v, g, low = np.split(x @ p["qkv_gates"]["kernel"], sizes, axis=-1)
    a = sigmoid(low @ p["forget"]["kernel"] + p["forget"]["bias"]) ** (1 / 16)
    o = recurrent(*(heads(z, H) for z in (q, k, v, a)), scale=(D // 2 // H) ** -0.5)
    check(y, merge(rms_norm(o) * p["norm"]["weight"] * silu(heads(g, H))) @ p["out"]["kernel"])


@together("GatedLinearAttention-conv")
def test_gated_linear_attention_with_a_convolution():
    p, x, y = call("GatedLinearAttention-conv")
    H = 2
    qkv, g, low = np.split(x @ p["qkv_gates"]["kernel"], [2 * D, 3 * D], axis=-1)
    q, k, v = np.split(silu(convolved(qkv, p["conv"]["weight"])), [D // 2, D], axis=-1)
    a = sigmoid(low @ p["forget"]["kernel"] + p["forget"]["bias"]) ** (1 / 16)
    o = recurrent(*(heads(z, H) for z in (q, k, v, a)), scale=(D // 2 // H) ** -0.5)
    check(y, merge(rms_norm(o) * p["norm"]["weight"] * silu(heads(g, H))) @ p["out"]["kernel"])


def convolved(x, taps):
    padded = np.pad(x, ((0, 0), (len(taps) - 1, 0), (0, 0)))
    return sum(w * padded[:, i : i + x.shape[1]] for i, w in enumerate(taps))


@together("HGRN2")
@pytest.mark.parametrize("by_layer", [{}, {"floor": np.linspace(0.1, 0.9, D)}], ids=["alone", "floor"])
def test_hgrn2(by_layer):
    p, x, y = call("HGRN2", **by_layer)
    H = 2
    q, f, i = np.split(x @ p["qfi"]["kernel"], 3, axis=-1)
    low = by_layer.get("floor", 0)
    f = low + (1 - low) * sigmoid(f)
    o = recurrent(heads(silu(q), H), heads(1 - f, H), heads(i, H), heads(f, H), scale=(D // H) ** -0.5)
    check(y, (rms_norm(merge(o)) * p["norm"]["weight"]) @ p["out"]["kernel"])


@together("MLGRU")
@pytest.mark.parametrize("by_layer", [{}, {"floor": np.linspace(0.1, 0.9, D)}], ids=["alone", "floor"])
def test_mlgru(by_layer):
    p, x, y = call("MLGRU", **by_layer)
    f, c, g = np.split(x @ p["fcg"]["kernel"], 3, axis=-1)
    low = by_layer.get("floor", 0)
    f, c = low + (1 - low) * sigmoid(f), silu(c)
    h, hs = np.zeros((2, D)), []
    for t in range(T):
        h = f[:, t] * h + (1 - f[:, t]) * c[:, t]
        hs.append(h)
    o = rms_norm(sigmoid(g) * np.stack(hs, axis=1)) * p["norm"]["weight"]
    check(y, o @ p["out"]["kernel"])


@together("RWKV6")
def test_rwkv6():
    p, x, y = call("RWKV6")
    H, K, rank = 2, D // 2, 3
    S, before, out = np.zeros((2, H, K, K)), np.zeros((2, D)), []
    for t in range(T):
        now = x[:, t]
        step = before - now
        low = np.tanh((now + step * p["mu_x"]) @ p["mix_in"]["kernel"]).reshape(2, 5, rank)
        mixed = [now + step * (p["mu"][n] + low[:, n] @ p["mix_out"][n]) for n in range(5)]
        r, k, v, g = (z @ p[name]["kernel"] for z, name in zip(mixed, "rkvg", strict=False))
        w = p["decay"] + np.tanh(mixed[4] @ p["decay_in"]["kernel"]) @ p["decay_out"]
        r, k, v, a = (heads(z, H) for z in (r, k, v, np.exp(-np.exp(w))))
        kv = k[..., None] * v[..., None, :]
        o = np.einsum("bhk,bhkv->bhv", r, S + p["bonus"][..., None] * kv)
        S = a[..., None] * S + kv
        o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 64e-5)
        out.append(merge(o * p["norm"]["weight"] + p["norm"]["bias"]) * silu(g) @ p["out"]["kernel"])
        before = now
    check(y, np.stack(out, axis=1))


@together("RWKV5")
def test_rwkv5():
    p, x, y = call("RWKV5")
    H, K = 2, D // 2
    S, before, out = np.zeros((2, H, K, K)), np.zeros((2, D)), []
    w, u = np.exp(-np.exp(p["decay"])).reshape(H, K, 1), p["bonus"][..., None]
    for t in range(T):
        now = x[:, t]
        mixed = [now + (before - now) * mu for mu in p["mu"]]
        r, k, v, g = (z @ p[name]["kernel"] for z, name in zip(mixed, "rkvg", strict=True))
        r, k, v = (heads(z, H) for z in (r, k, v))
        kv = k[..., None] * v[..., None, :]
        o = np.einsum("bhk,bhkv->bhv", r, S + u * kv)
        S = w * S + kv
        o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 64e-5)
        out.append(merge(o * p["norm"]["weight"] + p["norm"]["bias"]) * silu(g) @ p["out"]["kernel"])
        before = now
    check(y, np.stack(out, axis=1))


@together("RWKVChannel")
def test_rwkv_channel_mixing():
    p, x, y = call("RWKVChannel")
    before = np.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    r = sigmoid((x + (before - x) * p["mu_r"]) @ p["r"]["kernel"])
    k = np.maximum((x + (before - x) * p["mu_k"]) @ p["k"]["kernel"], 0) ** 2
    check(y, r * (k @ p["v"]["kernel"]))


def test_decays_beyond_the_dtype_have_finite_gradients():
    """exp(-exp(w)) is 0 from w = 5 up; exp(w) itself is inf from 89 up, and 0 * inf is no gradient."""
    w = jnp.array([-30.0, -1.0, 5.0, 100.0], jnp.float32)
    values, slopes = jax.vmap(jax.value_and_grad(lambda w: jnp.exp(log_decay(w))))(w)
    want = np.exp(-np.exp(np.array([-30.0, -1.0, 5.0, 100.0])))
    assert_close(values, want, "float32")
    assert_close(slopes[:2], -np.exp(w[:2]) * want[:2], "float32")
    assert slopes[2:].tolist() == [0, 0]


def windowed(p, x, H, window):
    q, k, v = (heads(z, H) for z in np.split(x @ p["qkv"]["kernel"], 3, axis=-1))
    dots = np.einsum("bthd,bshd->bhts", rotate(q), rotate(k)) / np.sqrt(D // H)
    back = np.arange(T)[:, None] - np.arange(T)
    e = np.where((back >= 0) & (back < window), np.exp(dots), 0)
    o = np.einsum("bhts,bshv->bthv", e / e.sum(-1, keepdims=True), v)
    return merge(o) @ p["out"]["kernel"]


@pytest.mark.parametrize(
    ("name", "window"),
    [
        pytest.param("SlidingWindowAttention", 4, marks=together("SlidingWindowAttention")),
        pytest.param("SlidingWindowAttention-long", 20, marks=together("SlidingWindowAttention-long")),
    ],
)
def test_sliding_window_attention(name, window):
    p, x, y = call(name)
    check(y, windowed(p, x, 2, window))


def test_a_window_of_one_token_is_the_values():
    with jax.enable_x64(True):
        module, variables, x = make("SlidingWindowAttention")
        y, _ = jax.jit(module.clone(window=1).apply)(variables, x)
        p, x = jax.tree.map(np.asarray, (variables["params"], x))
        assert_close(y, x @ p["qkv"]["kernel"][:, 2 * D :] @ p["out"]["kernel"], "float64")


@together("Based")
def test_based_is_its_two_halves():
    p, x, y = call("Based")
    with jax.enable_x64(True):
        half = frugax.layers.LinearAttention(
            heads=2, feature_map="taylor", key_size=3, param_dtype=jnp.float64
        )
        linear, _ = jax.jit(half.apply)({"params": p["linear"]}, x)
    check(y, np.asarray(linear) + windowed(p["window"], x, 2, 4))


@pytest.mark.parametrize(("d", "window"), [(4, 8), (16, 64)])
def test_bytes_that_based_carries(d, window):
    H, V, B = 2, 24, 3
    module = frugax.layers.Based(heads=H, key_size=d, window=window)
    shape = jax.ShapeDtypeStruct((B, 5, H * V), jnp.float32)
    (_, state), _ = jax.eval_shape(module.init_with_output, jax.random.key(0), shape)
    nbytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    linear = (1 + d + d * (d + 1) // 2) * (V + 1)  # features by values, and the weights' sum
    assert nbytes == 4 * B * (H * (linear + 2 * (window - 1) * V) + 1)  # and how long the document is


@together("GatedConvolution")
def test_gated_convolution():
    p, x, y = call("GatedConvolution")
    inner, gate = np.split(x @ p["in_gate"]["kernel"], 2, axis=-1)
    check(y, (silu(convolved(inner, p["conv"]["weight"])) * gate) @ p["out"]["kernel"])


def test_rotary_sees_only_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k = jnp.asarray(rng.standard_normal((2, 1, 3, 2, 6)))
        places = jnp.array([[0, 5, 700]])

        @jax.jit
        def dots(shift):
            return jnp.sum(
                frugax.layers.rotary(q, places + shift) * frugax.layers.rotary(k, places + 3), axis=-1
            )

        @jax.jit
        def moved(shift):
            a = frugax.layers.rotary(q, places + shift + 41)
            return jnp.sum(a * frugax.layers.rotary(k, places + 44), axis=-1)

        assert_close(moved(0), dots(0), jnp.float64)
        assert_close(frugax.layers.rotary(q, places), rotate_at(np.asarray(q), [0, 5, 700]), jnp.float64)


def test_rotary_at_millions_of_tokens_sees_only_differences():
    """float32: in the plain product position * frequency the angle is off by radians there."""
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 2, 64)).astype(np.float32)
    want = np.sum(rotate_at(q.astype(np.float64), [5]) * k, axis=-1)
    theta = (10000.0 ** (-np.arange(64) / 64)).astype(np.float32)

    @jax.jit
    def both(x, at, theta):
        learned = angles(at[..., None, None], theta[None, None, None], jnp.float32)
        return frugax.layers.rotary(x, at), learned

    for p in (10**6, 10**7, 2**31 - 1):
        found = (both(x, np.array([[at]], np.int32), theta) for x, at in ((q, p), (k, p - 5)))
        turned, learned = zip(*(map(np.asarray, pair) for pair in found), strict=True)
        assert_close(np.sum(turned[0] * turned[1], axis=-1), want, "float32")
        exact = np.cos(5 * theta.astype(np.float64))[None, None, None]
        assert_close(np.cos(learned[0] - learned[1]), exact, "float32")
    slopes = jax.jit(jax.grad(lambda f: angles(jnp.array([[7]]), f, jnp.float32).sum()))(theta[None])
    assert slopes.tolist() == [[7.0] * 64]


def rotate_at(x, places):
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * np.array(places)[:, None, None] * 10000.0 ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], axis=-1)


def test_positions_count_within_documents_and_across_calls():
    ids = jnp.array([[4, 4, 4, 4], [1, 2, 2, 1], [0, 0, 0, 3]])
    place, offset = frugax.layers.positions(jnp.array([5, 9, 0]), ids, (3, 4))
    assert place.tolist() == [[5, 6, 7, 8], [9, 0, 1, 0], [0, 1, 2, 0]]
    assert offset.tolist() == [9, 1, 1]
    place, offset = frugax.layers.positions(None, None, (2, 3))
    assert place.tolist() == [[0, 1, 2]] * 2
    assert offset.tolist() == [3, 3]


def test_a_positive_map_stays_positive_in_few_bits():
    """exp(x) itself: elu(x) + 1 is 0 in bfloat16 from x = -6 down, in float32 from -17 down."""
    for dtype, x in (("bfloat16", -8.0), ("float32", -20.0)):
        assert_close(frugax.layers.elu_plus_one(jnp.asarray(x, dtype)), np.exp(x), dtype)
    slopes = jax.vmap(jax.grad(frugax.layers.elu_plus_one))(jnp.array([-20.0, 0.0, 200.0]))
    assert_close(slopes, np.array([np.exp(-20.0), 1, 1]), "float32")


def test_one_decoded_token_costs_its_window():
    """Its projections and one query against 2048 keys: 2.6 MFLOP; in blocks of a window it took 8,800."""
    mixer = frugax.layers.SlidingWindowAttention(heads=4, window=2048)
    x = jax.ShapeDtypeStruct((1, 1, 256), jnp.float32)
    (_, state), variables = jax.eval_shape(mixer.init_with_output, jax.random.key(0), x)
    step = jax.jit(lambda v, x, state: mixer.apply(v, x, state=state)).lower(variables, x, state)
    needed = 2 * 4 * 256**2 + 2 * 2 * 2048 * 256
    assert needed <= step.cost_analysis()["flops"] < 1.2 * needed


def test_floored_gates_stay_finite_and_exact():
    from frugax.layers.modules.over_depth import floored_gate

    z = np.array([-1e4, -50.0, -3.0, 0.0, 3.0, 50.0, 1e4], np.float32)

    @jax.jit
    def both(z, floor):
        slopes = jax.grad(lambda z: floored_gate(z, floor)[0].sum())(z)
        return *floored_gate(z, floor), slopes

    for floor in (0.0, 0.3):
        log_f, inward, slopes = both(z, np.float32(floor))
        wide = np.maximum(z.astype(np.float64), -60)
        assert_close(inward, (1 - floor) * sigmoid(-wide), jnp.float32)
        assert_close(log_f, np.log(floor + (1 - floor) * sigmoid(wide)), jnp.float32)
        assert np.all(np.asarray(log_f) <= 0)
        assert np.isfinite(np.asarray(slopes)).all()
