"""The choice of the tests that run: covers of cases, what a change reaches, and budgets of CPU seconds."""

from typing import NamedTuple

import pytest

from tests import reach
from tests.cases import cover, served, tiers, traits
from tests.costs import judge, read_budgets


class Case(NamedTuple):
    T: int
    packed: bool
    dtype: str = "float32"


CASES = [Case(1, False), Case(1, True), Case(7, True), Case(300, True, "bfloat16"), Case(300, False)]


@pytest.mark.parametrize("strength", [1, 2])
def test_a_cover_misses_nothing_and_is_smaller(strength):
    sets = [set("abcd"), set("ab"), set("cd"), set("ce"), set("de")]
    chosen = cover(sets, strength)
    assert set().union(*(sets[i] for i in chosen)) == set("abcde")
    assert chosen == {1: [0, 3], 2: [0, 3, 4]}[strength]


def test_the_portable_form_keeps_each_trait_and_kernels_do_together():
    assert traits(CASES[3]) == {("T", "many"), ("packed", True), ("dtype", "bfloat16")}
    kept = [param.values[0] for param in tiers(CASES) if not param.marks]
    assert set().union(*map(traits, kept)) == set().union(*map(traits, CASES))
    assert len(kept) < len(CASES)
    lists = dict.fromkeys(("pallas_tpu", None, "pallas_gpu", "xla"), CASES)
    params = served(lists)
    assert sorted(map(repr, (p.values for p in params))) == sorted(repr((b, c)) for b in lists for c in CASES)
    kept = {
        backend: [p.values[1] for p in params if p.values[0] == backend and not p.marks] for backend in lists
    }
    assert all(kept.values())  # every backend runs
    every = set().union(*map(traits, CASES))
    assert set().union(*map(traits, kept["xla"])) == every
    kernels = kept["pallas_tpu"] + kept["pallas_gpu"]
    assert set().union(*map(traits, kernels)) == every
    assert len(kernels) < 2 * len(kept["xla"])


def test_a_change_reaches_its_users_alone():
    tests = reach.tests_for({"lib/kernels/rnn/pallas_gpu.py"})
    assert "tests/kernels/test_operations.py" in tests  # by `frugax.kernels.rnn`
    assert "tests/layers/mixers/test_flash_rnn.py" in tests
    assert not [file for file in tests if file.startswith("tests/formats")]
    sharded = reach.tests_for({"tests/kernels/sharded.py"})
    assert "tests/kernels/test_sharding.py" in sharded
    assert "tests/kernels/test_operations.py" not in sharded
    assert reach.tests_for({"docs/papers.md", "CHANGELOG.md"}) == []
    for unknown in ({"pyproject.toml"}, {"tests/conftest.py"}, None):
        assert reach.tests_for(unknown) == ["tests"]


def test_what_no_commit_tells_is_everything():
    assert reach.differing("0" * 40) is None
    assert reach.differing("HEAD") == set()


def test_a_folder_is_over_budget_at_30_percent_more():
    budgets = {"loop": 0.5, "folders": {"kernels/rnn": 10.0}}
    for cost, slower, over in ((12.9, 1, []), (13.1, 1, ["kernels/rnn"]), (13.1, 2, [])):
        assert judge({"kernels/rnn": cost}, [0.5 * slower], budgets)[1] == over
    assert judge({"new": 0.1}, [], budgets)[1] == ["new"]


def test_each_folder_of_tests_has_a_budget():
    files = (reach.ROOT / "tests").rglob("test_*.py")
    folders = {"/".join(file.relative_to(reach.ROOT / "tests").parts[:-1][:2]) or "tests" for file in files}
    assert set(read_budgets()["folders"]) == folders | {"start"}
