"""The benchmark of length: what docs say of the committed results, and a short run."""

from experiments.benchmarks import length_cpu
from experiments.benchmarks.markdown import read


def test_a_token_takes_as_long_at_any_length():
    """In the committed results, from 16,384 tokens to a million: within a tenth."""
    found = read("length_cpu")["rows"]
    assert tuple(r["tokens"] for r in found) == length_cpu.LENGTHS
    for name in ("forward_ns", "forward_and_gradient_ns"):
        times = [r[name] for r in found if r["tokens"] >= 16384]
        assert max(times) < 1.1 * min(times)


def test_it_times_both_passes():
    (row,) = length_cpu.rows((64,), 1)
    assert row.keys() == {"tokens", "forward_ns", "forward_and_gradient_ns"}
    assert min(row.values()) > 0
