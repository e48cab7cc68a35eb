"""`pytest --minutes N`: no test starts later than that; those left out are counted, file by file."""

import collections
import time

import pytest

LEFT = "left out: the time given by --minutes is over"


def pytest_addoption(parser):
    parser.addoption("--minutes", type=float, help="start no test later than that, and say which are left")


def pytest_configure(config):
    config.began = time.monotonic()


def pytest_runtest_setup(item):
    limit = item.config.option.minutes
    if limit is not None and time.monotonic() - item.config.began > 60 * limit:
        pytest.skip(LEFT)


def pytest_terminal_summary(terminalreporter, config):
    skipped = terminalreporter.stats.get("skipped", [])
    left = collections.Counter(r.nodeid.split("::")[0] for r in skipped if LEFT in str(r.longrepr))
    if left:
        terminalreporter.section(f"NOT RUN in {config.option.minutes:g} minutes: {left.total()} tests")
        for file, number in sorted(left.items()):
            terminalreporter.write_line(f"{number:5} {file}")
