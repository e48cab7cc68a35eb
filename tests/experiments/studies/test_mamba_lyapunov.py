"""Lyapunov exponents against maps whose exponents are known, and rounding against a bound that is derived."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from experiments.studies import mamba_lyapunov
from experiments.studies.lyapunov import log_growth, max_lyapunov_exponent, precision_gap
from tests.errors import assert_close

KEY = jax.random.key(0)
CHANNELS, STATES = 5, 3


def scan_step(A):
    """One token of Mamba's scan, by the library's own kernel: (state [1, D, N], (x, dt, B)) -> state."""

    def step(state, token):
        x_D, dt_D, B_N = token
        row = (x_D[None, None], dt_D[None, None], A, B_N[None, None], B_N[None, None])
        return frugax.kernels.selective_scan(*row, initial_state=state, backend="reference")[1]

    return step


def tokens(T, seed=0, dt=None):
    """Random x [T, D], dt [T, D] around 0.05 (or as given) and B [T, N]."""
    random = np.random.default_rng(seed)
    steps = np.exp(random.normal(-3, 1, (T, CHANNELS))) if dt is None else np.broadcast_to(dt, (T, CHANNELS))
    x, B = random.normal(size=(T, CHANNELS)), random.normal(size=(T, STATES))
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, steps, B))


def test_maps_with_known_exponents():
    """log 2 for the logistic map, 0.4192 for Henon's, log of the largest |eigenvalue| for a matrix."""
    with jax.enable_x64(True):
        count = jnp.zeros(20000)
        logistic = max_lyapunov_exponent(
            lambda x, _: 4 * x * (1 - x), jnp.asarray(0.3), count, KEY, burn_in=100
        )
        assert float(logistic) == pytest.approx(math.log(2), abs=0.01)

        def henon(state, _):
            x, y = state
            return 1 - 1.4 * x**2 + y, 0.3 * x

        start = (jnp.asarray(0.1), jnp.asarray(0.1))
        assert float(max_lyapunov_exponent(henon, start, count, KEY, burn_in=100)) == pytest.approx(
            0.4192, abs=0.01
        )

        M = jnp.array([[0.9, 5.0], [0.0, 0.3]])  # its norm is far above 1, its eigenvalues are not
        turned = max_lyapunov_exponent(lambda x, _: M @ x, jnp.ones(2), count[:400], KEY, burn_in=100)
        assert float(turned) == pytest.approx(math.log(0.9), abs=1e-9)


def test_what_forgets_has_no_exponent_above_minus_infinity():
    growth = log_growth(lambda x, _: jnp.zeros_like(x) * x, jnp.ones(3), jnp.zeros(4), KEY)
    assert (growth == -jnp.inf).all()


def test_bad_calls_say_what_fits():
    with pytest.raises(ValueError, match=r"burn_in: got 4; expected 0 to 3 for 4 tokens"):
        max_lyapunov_exponent(lambda x, _: x, jnp.ones(3), jnp.zeros(4), KEY, burn_in=4)
    with pytest.raises(ValueError, match=r"state: got int32\[3\]; expected a tree of floating"):
        log_growth(lambda x, _: x, jnp.ones(3, jnp.int32), jnp.zeros(4), KEY)


def test_a_random_selective_scan_never_has_a_positive_exponent():
    """A diagonal map's estimate lies between its closed form and that plus log |v_i| / T (the first v)."""
    T = 300

    @jax.jit
    def estimate(A, inputs, key):
        return log_growth(scan_step(A), jnp.zeros((1, CHANNELS, STATES), jnp.float32), inputs, key)

    for seed in range(4):
        A = -jnp.exp(jax.random.normal(jax.random.key(seed), (CHANNELS, STATES)))
        inputs = tokens(T, seed)
        growth = np.asarray(estimate(A, inputs, jax.random.key(seed)), np.float64)
        closed = (np.asarray(inputs[1], np.float64).mean(0)[:, None] * np.asarray(A, np.float64)).max()
        assert (growth <= 0).all()
        # log of a float32 exp near 1 is off by an eps or so a token; a normal v of 15 is rarely 1000 to 1.
        assert closed - math.log(1000) / T <= growth.mean() <= closed + 1e-6
        assert growth.mean() < -1e-3  # not merely "0"


def test_with_a_constant_step_it_is_the_closed_form():
    A = -jnp.arange(1.0, 1 + CHANNELS * STATES).reshape(CHANNELS, STATES)
    inputs = tokens(400, dt=0.1)
    zeros = jnp.zeros((1, CHANNELS, STATES), jnp.float32)
    # After 200 tokens the next slowest coordinate is e^-20 of the slowest; what is left is float32's log.
    found = jax.jit(lambda i: max_lyapunov_exponent(scan_step(A), zeros, i, KEY, burn_in=200))(inputs)
    assert_close(found, -0.1, "float32")


def test_rounding_is_forgotten_where_the_exponent_is_negative_and_grows_where_it_is_positive():
    """bfloat16 states stay within the sum of what each token rounds, contracted since; A > 0 has no bound."""
    T, unit = 2000, 2.0**-8
    inputs = tokens(T)
    A = -jnp.arange(1.0, 1 + CHANNELS * STATES).reshape(CHANNELS, STATES) / 4

    @jax.jit
    def gap(A):
        return precision_gap(
            scan_step(A), jnp.zeros((1, CHANNELS, STATES), jnp.float32), inputs, jnp.bfloat16
        )

    stable, unstable = np.asarray(gap(A)), np.asarray(gap(-A / 100))

    # e_t <= a_t e_{t-1} + unit * (|h_t| for the state, dt |A| |h_t| for the decay's dt, 3 |s_t| for the
    # source's three factors), each to first order: 5% for the rest.
    h = np.zeros((CHANNELS, STATES))
    e, bound = np.zeros_like(h), []
    for x_D, dt_D, B_N in zip(*(np.asarray(a, np.float64) for a in inputs), strict=True):
        rate = dt_D[:, None] * np.asarray(A, np.float64)
        source = (dt_D * x_D)[:, None] * B_N
        h = np.exp(rate) * h + source
        e = np.exp(rate) * e + 1.05 * unit * ((1 - rate) * np.abs(h) + 3 * np.abs(source))
        bound.append(np.sqrt((e**2).sum()))
    assert (stable <= bound).all()
    assert stable.max() > 1e-3  # it is rounded at all
    assert stable[T // 2 :].max() < 2 * stable[: T // 2].max()
    assert unstable[-1] > 100 * unstable[T // 4]


@pytest.fixture(scope="module")
def tiny():
    """An untrained Mamba of two blocks, and text."""
    module = mamba_lyapunov.models(mamba_lyapunov.SMOKE)["mamba"]
    text = jax.random.randint(KEY, (2, 80), 0, 256)
    return module, module.init(KEY, text)["params"], text


def test_both_models_are_of_equal_size():
    pair = mamba_lyapunov.models(mamba_lyapunov.Sizes())
    sizes = [mamba_lyapunov.parameters(module) for module in pair.values()]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]


def test_layers_read_one_by_one_are_the_decoder_and_their_recurrence_its_state(tiny):
    module, params, text = tiny
    (after,) = module.apply({"params": params}, text)[1].layers
    for i, (_, _, (dt, u, B, A)) in enumerate(mamba_lyapunov.mamba_layers(module, params, text)):
        h = np.zeros(A.shape)
        for dt_E, u_E, B_N in zip(*(np.asarray(a[1], np.float64) for a in (dt, u, B)), strict=True):
            h = np.exp(dt_E[:, None] * np.asarray(A, np.float64)) * h + (dt_E * u_E)[:, None] * B_N
        assert_close(after.memory[i, 1], h, "float32")


def test_the_exponent_of_a_block_from_its_decoding_step_is_the_closed_form(tiny):
    module, params, text = tiny
    burn_in = 20
    layers = mamba_lyapunov.exponents(module, params, text, KEY, burn_in)
    assert len(layers) == 2
    for layer in layers:
        assert (layer["estimates"] < 0).all()
        # Once the convolution has forgotten, the map is diagonal: no estimate is above the closed form.
        assert (layer["estimates"] <= layer["closed_form"] + 1e-6).all()
        assert (layer["estimates"] > layer["closed_form"] - math.log(1000) / (80 - burn_in)).all()


def test_deviation_ignores_what_softmax_ignores():
    logits = np.random.default_rng(0).normal(size=(2, 7, 11))
    assert_close(mamba_lyapunov.deviation(logits * 1.01 + 3, logits), np.full(7, 0.01), "float64")


@pytest.mark.full
def test_the_whole_experiment(tmp_path, monkeypatch, capsys):
    command = ["mamba_lyapunov", "--smoke", "--out", f"{tmp_path}/out.json", "--plot", f"{tmp_path}/plot.png"]
    monkeypatch.setattr("sys.argv", command)
    mamba_lyapunov.main()
    result = json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "plot.png").stat().st_size > 10000
    assert all(layer["largest_estimate"] <= 0 for layer in result["exponents"])
    mamba = result["tuning"]["mamba"]
    # 2 layers of rank 2 on [16, 64] and [32, 1 + 2 * 4]
    assert mamba["lora bfloat16"]["trained_parameters"] == 2 * 2 * (16 + 64 + 32 + 9)
    assert mamba["full bfloat16"]["from full float32"]["logits"] > 0
    assert "4 steps" not in capsys.readouterr().err
