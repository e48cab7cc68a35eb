"""The package as installed: what importing costs, what it holds, and that every documented example runs."""

import ast
import doctest
import functools
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import jax
import pytest
from flax import linen as nn

import frugax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = [name for name in frugax.__all__ if name != "__version__"]
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(frugax.__path__, "frugax.") if not m.name.endswith("__main__")
)

# Modules with examples of half a CPU second or more, most of it to compile: other default tests call what
# they show, and the full tier runs them. By their whole names tests/reach.py knows this file for their user.
DEAR = (
    "frugax.compress.dictionary",
    "frugax.compress.dictionary_matmul",
    "frugax.formats",
    "frugax.formats.bitmod",
    "frugax.formats.format",
    "frugax.formats.olive",
    "frugax.formats.quantized_tensor",
    "frugax.formats.scales",
    "frugax.kernels.quantized_update",
    "frugax.kernels.selective_scan_2d",
    "frugax.kernels.ssd",
    "frugax.kernels.trapezoidal_ssd",
    "frugax.layers.bidirectional",
    "frugax.layers.channel.decoupled_router",
    "frugax.layers.channel.moe",
    "frugax.layers.mixers.based",
    "frugax.layers.mixers.gated_linear_attention",
    "frugax.layers.mixers.mamba",
    "frugax.layers.mixers.mamba2",
    "frugax.layers.mixers.rwkv5",
    "frugax.layers.mixers.rwkv6",
    "frugax.layers.vision.blocks",
    "frugax.layers.vision.selective_scan_2d",
    "frugax.memory.tiles",
    "frugax.models.decoder",
    "frugax.models.lmuformer",
    "frugax.models.m3vit",
    "frugax.models.stages",
    "frugax.models.vision_mamba",
    "frugax.moe.collected",
    "frugax.moe.dispatch",
    "frugax.moe.expert_major",
    "frugax.moe.experts",
    "frugax.moe.hashing",
    "frugax.moe.losses",
    "frugax.moe.memory",
    "frugax.moe.refactoring",
    "frugax.moe.resizing",
    "frugax.moe.routers",
    "frugax.moe.soft",
    "frugax.optim.layerwise.active",
    "frugax.optim.layerwise.compressed",
    "frugax.optim.layerwise.slimfit",
    "frugax.optim.layerwise.step",
    "frugax.optim.low_bit.eight_bit",
    "frugax.optim.low_bit.stochastic_rounding",
    "frugax.optim.low_rank.fisher",
    "frugax.optim.low_rank.projectors",
    "frugax.optim.zeroth_order.directions",
    "frugax.optim.zeroth_order.distributed",
    "frugax.optim.zeroth_order.estimators",
    "frugax.optim.zeroth_order.offload",
    "frugax.optim.zeroth_order.parts",
    "frugax.optim.zeroth_order.qzo",
    "frugax.optim.zeroth_order.sparse_mezo",
    "frugax.optim.zeroth_order.step",
    "frugax.optim.zeroth_order.subspace",
    "frugax.parallel.experts",
    "frugax.parallel.placement",
    "frugax.parallel.state_spaces",
    "frugax.peft.lora",
    "frugax.peft.welore",
    "frugax.planner.distca",
    "frugax.planner.search",
    "frugax.quant.awq",
    "frugax.quant.calibrate",
    "frugax.quant.clipping",
    "frugax.quant.gptq",
    "frugax.quant.params",
    "frugax.quant.qmoe",
    "frugax.quant.rounding",
    "frugax.quant.sensitivity",
    "frugax.quant.statistics",
    "frugax.quant.training.dot",
    "frugax.quant.training.layer",
    "frugax.quant.training.rounding",
)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_starts_no_device():
    out = python(
        f"import frugax, {', '.join(f'frugax.{name}' for name in PACKAGES)}\n"
        "import sys; from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())\n"
        "print(*(name in sys.modules for name in ('jax.experimental.pallas', 'scipy.linalg')))"
    )
    assert out.split() == ["False", "False", "False"]


def test_import_costs_nothing_over_jax():
    """Sub-packages load on first use."""
    out = python(
        "import sys, jax; before = set(sys.modules); import frugax; print(set(sys.modules) - before)"
    )
    assert out.strip() == "{'frugax'}"


@pytest.fixture
def compiled_modules(monkeypatch):
    """Compile each call of a Flax module as one program: examples without `jit` make a hundred small ones."""

    def compiled(method):
        def call(self, *args, **named):
            arrays = {n: x for n, x in named.items() if isinstance(x, jax.Array)}
            rest = {n: x for n, x in named.items() if n not in arrays}
            return jax.jit(functools.partial(method, self, **rest))(*args, **arrays)

        return call

    for name in ("init_with_output", "apply"):  # `init` calls the first
        monkeypatch.setattr(nn.Module, name, compiled(getattr(nn.Module, name)))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.full if name in DEAR else []) for name in MODULES],
)
def test_examples_run(name, compiled_modules):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_dear_modules_are_there():
    assert set(DEAR) <= set(MODULES)


def test_every_public_callable_has_an_example():
    results = {"LowRank", "LowRankPart"}  # made by functions that have the example
    missing = []
    for package in PACKAGES:
        public = getattr(frugax, package)
        for name in public.__all__:
            thing = getattr(public, name)
            # A state: its function has the example. A module: its functions have.
            if hasattr(thing, "_fields") or not callable(thing) or name in results:
                continue
            doc = thing.__doc__ or ""
            other = re.search(r"Example: see `(\w+)`", doc)
            if ">>>" not in (getattr(public, other[1]).__doc__ if other else doc):
                missing.append(f"{package}.{name}")
    assert not missing


def test_every_package_is_public():
    """A folder that `import frugax` does not offer would be found by nobody; `papers` is a command."""
    folders = {path.parent.name for path in (ROOT / "lib").glob("*/__init__.py")}
    assert folders == {*PACKAGES, "papers"}


def test_a_wheel_has_every_file_of_the_library():
    """setup.py packs folders with an `__init__.py`, and beside Python what its globs name."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "setup")
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert "find_packages('lib')" in given["packages"]
    globs = ast.literal_eval(given["package_data"])[""]
    files = [f for f in (ROOT / "lib").rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert [f for f in files if f.suffix != ".py" and not any(fnmatch(f.name, glob) for glob in globs)] == []
    folders = {folder for file in files for folder in file.relative_to(ROOT).parents if folder.parts}
    assert [folder for folder in sorted(folders) if not (ROOT / folder / "__init__.py").exists()] == []


def test_core_dependencies_are_what_the_library_imports():
    imported = set()
    for path in (ROOT / "lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    # jaxlib belongs to jax. safetensors is asked for where a checkpoint is read, with an error that names it.
    wanted = imported - set(sys.stdlib_module_names) - {"frugax", "jaxlib", "safetensors"}
    assert {re.match(r"[\w-]+", dependency)[0] for dependency in PROJECT["dependencies"]} == wanted


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["dynamic"]
    assert importlib.metadata.version("frugax") == frugax.__version__
    for name in ("pyproject.toml", "CITATION.cff"):
        assert frugax.__version__ not in (ROOT / name).read_text()
