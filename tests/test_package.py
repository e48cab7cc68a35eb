"""The package as installed: what importing costs, what it holds, and that every documented example runs."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import frugax

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(frugax.__path__, "frugax.") if not m.name.endswith("__main__")
)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_starts_no_device():
    out = python(
        "import frugax, frugax.kernels, frugax.layers, frugax.parallel\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized(), 'jax.experimental.pallas' in __import__('sys').modules)"
    )
    assert out.split() == ["False", "False"]


def test_import_costs_nothing_over_jax():
    """Sub-packages load on first use."""
    out = python(
        "import sys, jax; before = set(sys.modules); import frugax; print(set(sys.modules) - before)"
    )
    assert out.strip() == "{'frugax'}"


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_every_public_callable_has_an_example():
    missing = []
    for package in ("formats", "kernels", "layers", "optim", "parallel"):
        room = getattr(frugax, package)
        for name in room.__all__:
            thing = getattr(room, name)
            # A state: its function has the example. A module: its functions have.
            if hasattr(thing, "_fields") or not callable(thing):
                continue
            doc = thing.__doc__ or ""
            if ">>>" not in doc:
                missing.append(f"{package}.{name}")
    assert not missing
