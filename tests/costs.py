"""`pytest --costs`: CPU seconds of each folder of tests, held to the budgets of tests/costs.toml.

`--write-costs` makes what a run took the budgets of its folders: for a quiet machine.

A test's seconds are those of its process and of the processes it waited for, on all cores. Machines differ
and share their cores, so a loop of known cost runs between tests, and budgets grow by what it says.
"""

import collections
import math
import resource
import time
import tomllib
from pathlib import Path

import pytest

from tests.devices import EIGHT

TESTS = Path(__file__).parent
BUDGETS = TESTS / "costs.toml"
ALLOWED = 1.3  # of a budget
COSTS, LOOPS = pytest.StashKey[collections.Counter](), pytest.StashKey[list[float]]()
LINES, EACH = pytest.StashKey[list[str]](), pytest.StashKey[list[tuple[float, str]]]()
DEAREST = 25  # tests that are named
LEAST = 15  # CPU seconds of a budget: which test pays for imports and shared fixtures differs from run to run


def pytest_addoption(parser):
    parser.addoption("--costs", action="store_true", help="CPU seconds per folder; fail where one is over")
    parser.addoption("--write-costs", action="store_true", help="make them the budgets of tests/costs.toml")


def pytest_configure(config):
    config.stash[COSTS] = collections.Counter()
    for key in (LOOPS, LINES, EACH):
        config.stash[key] = []


def seconds() -> float:
    """Return the CPU seconds of this process so far, with its children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used) + EIGHT.seconds


def loop() -> float:
    """Return the seconds that a fixed piece of work takes on this core now."""
    began = time.thread_time()
    sum(i * i for i in range(50_000))
    return time.thread_time() - began


def folder(path: Path) -> str:
    """Return the folder that a test counts for: at most two names, as kernels/rnn or optim."""
    return "/".join(path.relative_to(TESTS).parts[:-1][:2]) or "tests"


def charged(item: pytest.Item) -> str:
    """Return the folder that a test counts for: its operation's, if it is one of a table of operations."""
    name = item.callspec.params.get("operation") if hasattr(item, "callspec") else None
    own = f"{folder(item.path)}/{name}"
    return own if (TESTS / own).is_dir() else folder(item.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    costs, loops = item.config.stash[COSTS], item.config.stash[LOOPS]
    if not costs:  # imports and collection
        costs["start"] = seconds()
    if len(loops) < 1 + sum(costs.values()) / 5:
        loops.append(loop())
    before = seconds()
    result = yield
    cost = seconds() - before
    costs[charged(item)] += cost
    item.config.stash[EACH].append((cost, item.nodeid))
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    told = getattr(node, "workeroutput", {})
    node.config.stash[COSTS].update(told.get("costs", {}))
    node.config.stash[LOOPS].extend(told.get("loops", []))
    node.config.stash[EACH].extend(map(tuple, told.get("each", [])))


def judge(costs: dict[str, float], loops: list[float], budgets: dict) -> tuple[list[str], list[str]]:
    """Return the table's lines, and the folders that cost too much."""
    slower = max(1.0, sum(loops) / max(len(loops), 1) / budgets["loop"])
    lines, over = [f"{'seconds':>8} {'budget':>7}  (this machine takes {slower:.2f} times the budgets')"], []
    for name, cost in sorted(costs.items()):
        budget = budgets["folders"].get(name)
        passed = budget is None or cost > ALLOWED * slower * budget
        over += [name] if passed else []
        lines.append(f"{cost:8.1f} {'none' if budget is None else budget:>7}  {name}{'  <- over' * passed}")
    return [*lines, f"{sum(costs.values()):8.1f}          all"], over


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    config = session.config
    costs, loops, each, lines = (config.stash[key] for key in (COSTS, LOOPS, EACH, LINES))
    if hasattr(config, "workeroutput"):
        config.workeroutput |= {"costs": dict(costs), "loops": loops, "each": each}
        return
    if config.option.write_costs:
        write_budgets(costs, sum(loops) / len(loops))
    if config.option.costs or config.option.write_costs:
        table, over = judge(costs, loops, read_budgets())
        lines += [f"{cost:8.1f}  {name}" for cost, name in sorted(each, reverse=True)[:DEAREST]] + table
        if over and config.option.markexpr == "not full":  # budgets are the default tier's
            lines.append(f"over budget by more than 30 %: {', '.join(over)} (tests/costs.toml)")
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def read_budgets() -> dict:
    """Return tests/costs.toml."""
    return tomllib.loads(BUDGETS.read_text())


def write_budgets(costs: dict[str, float], took: float) -> None:
    """Make costs the budgets of their folders, in seconds of the machine that the others are of."""
    budgets = read_budgets()
    slower = took / budgets["loop"]
    taken = {name: max(LEAST, math.ceil(cost / slower)) for name, cost in costs.items()}
    folders = budgets["folders"] | taken
    head = BUDGETS.read_text().split("[folders]")[0]
    lines = [f'"{name}" = {seconds}' for name, seconds in sorted(folders.items())]
    BUDGETS.write_text("\n".join([f"{head}[folders]", *lines, ""]))


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash[LINES]:
        terminalreporter.write_line(line)
