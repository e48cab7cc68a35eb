"""Run on CPU unless told otherwise, with shapes and dtypes of every frugax signature checked at run time."""

import gc
import os

from jaxlib import xla_client

from tests.devices import QUICK

# A GPU or TPU run says so: FRUGAX_TEST_PLATFORM=cuda pytest -m gpu
os.environ.setdefault("JAX_PLATFORMS", os.environ.get("FRUGAX_TEST_PLATFORM", "cpu"))
if os.environ["JAX_PLATFORMS"] == "cpu" and "XLA_FLAGS" not in os.environ:
    # Read once, now: libtpu would read them too, and end the process at a CPU flag that it doesn't know.
    os.environ["XLA_FLAGS"] = QUICK
    xla_client.CompileOptions()
    del os.environ["XLA_FLAGS"]
# libtpu compiles for chips that are not here: it must not look for them, nor for other users of them.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import jaxtyping
import pytest

from tests.cases import SECOND_CHIPS

pytest_plugins = ["tests.costs", "tests.minutes"]
jaxtyping.install_import_hook("frugax", "beartype.beartype")


def pytest_collection_finish():
    """Collect garbage seldom: traces make objects by the million, and each round walks over all imports."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def unchecked_types():
    """The library's own errors, as users see them: without this file's run-time type checks before them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Tests of one `xdist_group` run in one worker."""
    if config.getoption("numprocesses", None):
        config.option.dist = "loadgroup"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Choose tiers by chip; keep in one worker what shares the eight devices, or fixtures of a module."""
    for item in items:
        if "callspec" in vars(item) and item.callspec.params.get("chip") in SECOND_CHIPS:
            item.add_marker(pytest.mark.full)
        if "gpu" in item.nodeid:  # JAX interprets Hopper's kernels on memory that starts as NaN
            item.add_marker(pytest.mark.nan)
        fixtures = [fixture for same in item._fixtureinfo.name2fixturedefs.values() for fixture in same]
        if "run_on_eight_devices" in item.function.__code__.co_names:
            item.add_marker(pytest.mark.xdist_group("eight devices"))
        elif any(fixture.scope == "module" for fixture in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
