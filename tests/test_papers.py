"""lib/papers/ tells the truth: symbols exist, tests are collected, and the command finds them."""

import ast
import re
import signal
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from frugax.papers import describe, families, find, papers, resolve

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("paper", papers(), ids=lambda p: p.slug)
def test_symbols_exist(paper):
    assert paper.symbols
    assert paper.tests
    for symbol in paper.symbols:
        assert callable(resolve(symbol))


def test_each_says_what_is_left_out():
    for paper in papers():
        assert paper.left_out.strip(), f"{paper.slug}: say what is left out, or 'nothing'"
        word = "  whole: " if paper.left_out == "nothing" else f"  left out: {paper.left_out}"
        assert word in describe(paper)
    assert {p.left_out == "nothing" for p in papers()} == {True, False}


def named_tests() -> set[str]:
    return {test for paper in papers() for test in paper.tests}


def test_every_named_test_is_a_function():
    missing = []
    for file, names in groupby(sorted(named_tests()), key=lambda test: test.partition("::")[0]):
        tree = ast.parse((ROOT / file).read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        missing += [name for name in names if name.partition("::")[2] not in there]
    assert not missing


@pytest.mark.full
def test_every_named_test_is_collected():
    named = named_tests()
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *sorted(named)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-2000:]
    collected = {line.split("[")[0] for line in out.stdout.splitlines() if "::" in line}
    assert named <= collected


def test_a_family_is_a_file_with_its_papers_sorted():
    assert list(families()) == sorted(path.stem for path in (ROOT / "lib/papers").glob("*.toml"))
    listed = [(p.family, p.slug) for p in papers()]
    assert listed == sorted(listed)
    assert {family for family, _ in listed} == set(families())


def test_slugs_and_identifiers_are_unique():
    for values in ([p.slug for p in papers()], [p.arxiv for p in papers()]):
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("paper", papers(), ids=lambda p: p.slug)
def test_the_identifier_has_the_year(paper):
    assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
    assert 2000 + int(paper.arxiv[:2]) == paper.year


def test_words_find_a_paper():
    assert [p.slug for p in find(["gated", "LINEAR", "hardware"])] == ["gla"]
    assert [p.slug for p in find(["2312.06635"])] == ["gla"]
    assert [p.slug for p in find(["galore"])][:1] == ["galore"]  # its own paper first
    assert find(["no such paper"]) == []
    text = describe(find(["gla"])[0])
    assert "frugax.kernels.linear_attention(q, k, v, log_decay=None" in text
    assert "test: tests/" in text


def test_the_command():
    command = [sys.executable, "-m", "frugax.papers"]
    assert "gla: Gated Linear" in subprocess.check_output([*command, "2312.06635"], text=True)
    lost = subprocess.run([*command, "xyzzy"], capture_output=True, text=True)
    assert lost.returncode != 0
    assert "no paper" in lost.stderr


@pytest.mark.full
@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="the system has no such signal")
def test_the_command_ends_quietly_where_nobody_reads_on():
    command = [sys.executable, "-m", "frugax.papers"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGPIPE
