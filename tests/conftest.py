"""Run on CPU unless told otherwise, with shapes and dtypes of every frugax signature checked at run time."""

import os

# A GPU or TPU run says so: FRUGAX_TEST_PLATFORM=cuda pytest -m gpu
os.environ.setdefault("JAX_PLATFORMS", os.environ.get("FRUGAX_TEST_PLATFORM", "cpu"))
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most of the time goes into compiling small programs once: leave LLVM's optimizer out.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# libtpu compiles for chips that are not here: it must not look for them, nor for other users of them.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import jaxtyping
import pytest

jaxtyping.install_import_hook("frugax", "beartype.beartype")


@pytest.fixture
def unchecked_types():
    """The library's own errors, as users see them: without this file's run-time type checks before them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
