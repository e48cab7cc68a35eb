"""README.md: its example runs, and all pages' tables are those of the code and the results."""

import re
from pathlib import Path

import pytest

from experiments.benchmarks.tables.pages import PAGES, rewritten

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_two_blocks_are_the_main_job_and_the_tests():
    assert [kind for kind, _ in BLOCKS[:2]] == ["bash", "bash"]
    assert "experiments.train --config=experiments/configs/lm/quickstart.py" in BLOCKS[0][1]
    assert "pytest" in BLOCKS[1][1]


def test_what_it_links_to_exists():
    for page in PAGES:
        text = (README.parent / page).read_text()
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert link.startswith("https://") or (README.parent / page).parent.joinpath(link).exists(), link


def test_the_example_runs():
    (code,) = (code for kind, code in BLOCKS if kind == "python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].shape == (2, 100, 4, 32)
    assert names["logits"].shape == (1, 1, 256)


def test_it_reads_in_one_sitting():
    assert len(README.read_text().splitlines()) <= 170


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_up_to_date(page):
    assert rewritten(page) == (README.parent / page).read_text()
