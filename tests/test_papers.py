"""papers.toml tells the truth: its symbols exist, its tests are collected, and the command finds them."""

import subprocess
import sys
from pathlib import Path

import pytest

from frugax.papers import describe, find, papers, resolve

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("paper", papers(), ids=lambda p: p.slug)
def test_symbols_exist(paper):
    assert paper.symbols
    assert paper.tests
    for symbol in paper.symbols:
        assert callable(resolve(symbol))


def test_every_named_test_is_collected():
    named = {test for paper in papers() for test in paper.tests}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *sorted(named)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-2000:]
    collected = {line.split("[")[0] for line in out.stdout.splitlines() if "::" in line}
    assert named <= collected


def test_slugs_are_unique_and_sorted():
    slugs = [p.slug for p in papers()]
    assert slugs == sorted(set(slugs))


def test_words_find_a_paper():
    assert [p.slug for p in find(["gated", "LINEAR", "hardware"])] == ["gla"]
    assert find(["no such paper"]) == []
    text = describe(find(["gla"])[0])
    assert "frugax.kernels.linear_attention(q, k, v, log_decay=None" in text
    assert "test: tests/" in text


def test_the_command():
    command = [sys.executable, "-m", "frugax.papers"]
    assert "lightning_attention" in subprocess.check_output([*command, "lightning"], text=True)
    lost = subprocess.run([*command, "xyzzy"], capture_output=True, text=True)
    assert lost.returncode != 0
    assert "no paper" in lost.stderr
