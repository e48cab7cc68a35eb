"""The frame of GPU benchmarks, run on CPU: a contender that is wrong or missing is never timed."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import gpu


@dataclasses.dataclass(frozen=True)
class Shape:
    n: int

    def arrays(self):
        rng = np.random.default_rng(0)
        return [rng.standard_normal(self.n, np.float32).astype(jnp.bfloat16) for _ in range(3)]


def product(x, y):
    return x * y


def contender(f, shape):
    return gpu.jax_runner(f, shape.arrays())


def missing(shape):
    raise ImportError("no such package")


def test_only_what_agrees_is_timed(monkeypatch):
    monkeypatch.setattr(gpu, "copy_rate", lambda: 1e9)
    measured = gpu.measure(
        [Shape(1000)],
        {
            "right": partial(contender, product),
            "wrong value": partial(contender, lambda x, y: x * y + 0.1),
            "wrong gradient": partial(contender, lambda x, y: x * jnp.round(y * 2**9) / 2**9),
            "missing": missing,
            "too slow": missing,
        },
        lambda shape: product,
        stand_in=lambda shape: Shape(64),
        bound=2**-6,
        least_bytes=lambda shape, passes: {"forward": 6, "both": 12}[passes] * shape.n,
        effort=gpu.Effort(repeats=2, without=("slow",)),
    )
    rows = list(measured)
    assert [(row["n"], row["passes"]) for row in rows] == [(1000, "forward"), (1000, "both")]
    for row in rows:
        assert set(row["median_ms"]) == set(row["share_of_copy"]) == {"right"}
        assert row["left_out"] == ["too slow"]
        assert "too slow" not in row["errors"]
        assert row["errors"]["missing"] == "ImportError: no such package"
        assert (
            row["errors"]["right"]
            < 2**-6
            < min(row["errors"]["wrong value"], row["errors"]["wrong gradient"])
        )


def test_one_of_each_kind_is_the_first():
    odd_and_even = gpu.one_each([Shape(5), Shape(6), Shape(8), Shape(7)], lambda shape: shape.n % 2)
    assert odd_and_even == [Shape(5), Shape(6)]
