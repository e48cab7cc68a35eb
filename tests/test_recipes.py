"""Every recipe of CONTRIBUTING.md, followed to its end: what is added is exported, tested and announced."""

import inspect
import re
from pathlib import Path

import pytest

import frugax
from frugax.formats.named import BY_NAME
from frugax.papers import papers
from tests.experiments.test_classify import CONFIGS as CLASSIFIERS
from tests.formats.test_formats import EVERY as MOMENTS
from tests.formats.test_schemes import WEIGHTS
from tests.kernels.harness import OPERATIONS as TESTED
from tests.layers.mixers.mixers import MIXERS
from tests.optim.optimizers import CASES

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
SYMBOLS = {symbol for paper in papers() for symbol in paper.symbols}
OPERATIONS = sorted(
    path.parent.name for path in (ROOT / "lib/kernels").glob("*/__init__.py") if path.parent.name != "common"
)
COMPOSED = sorted(path.stem for path in (ROOT / "lib/kernels").glob("*.py") if path.stem != "__init__")
LAYER_FILES = sorted(
    (path.parent.name, path.stem)
    for path in (ROOT / "lib/layers/mixers").glob("*.py")
    if path.stem not in ("__init__", "mixer")
)
SUITES_OF_THEIR_OWN = {  # no matrices; moments in 8 bits
    "lion_k": "tests/optim/test_lion_and_layers.py",
    **{
        name: "tests/optim/low_bit/test_eight_bit.py"
        for name in frugax.optim.__all__
        if name.endswith("_8bit")
    },
}
CONFIGS = {
    "lm": "train_{}",
    "low_bit": "train_{}",
    "classify": "classify_{}",
    "optimizers": "optimizers_quality",
}


def optimizers():
    """The public functions that take a learning rate first: those that stand in for `optax.adamw`."""
    for name in frugax.optim.__all__:
        thing = getattr(frugax.optim, name)
        if (
            inspect.isfunction(thing)
            and next(iter(inspect.signature(thing).parameters), "") == "learning_rate"
        ):
            yield name


def announced(name):
    return re.search(rf"\b{name}\b", CHANGELOG)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(name):
    assert name in frugax.kernels.__all__
    folder = ROOT / "lib/kernels" / name
    for file in ("reference", "inputs", "xla", "pallas_tpu", "pallas_gpu"):
        assert (folder / f"{file}.py").exists() or (folder / file / "__init__.py").exists(), file
    assert list(folder.rglob("tiling.py"))  # its own, or one of each kernel
    row = TESTED[name]
    assert set(row.cases) >= {"xla", "pallas_tpu", "pallas_gpu"}
    assert row.exported
    assert row.on_tpu
    assert row.on_gpu
    assert announced(name)


@pytest.mark.parametrize("name", COMPOSED)
def test_an_operation_composed_of_others(name):
    assert name in frugax.kernels.__all__
    assert TESTED[name].cases
    assert announced(name)


@pytest.mark.parametrize(("folder", "file"), LAYER_FILES)
def test_a_mixer(folder, file):
    source = (ROOT / f"lib/layers/{folder}/{file}.py").read_text()
    classes = [
        name
        for name, base in re.findall(r"^class (\w+)\((\w+)\):", source, re.MULTILINE)
        if base == "Mixer" or base in {class_name for class_name, _ in MIXERS.values()}
    ]
    assert classes
    for name in classes:
        assert name in frugax.layers.__all__
        assert name in {class_name for class_name, _ in MIXERS.values()}
        assert f"frugax.layers.{name}" in SYMBOLS


@pytest.mark.parametrize("name", list(optimizers()))
def test_an_optimizer(name):
    if name in SUITES_OF_THEIR_OWN:
        assert re.search(rf"\b{name}\b", (ROOT / SUITES_OF_THEIR_OWN[name]).read_text())
    else:
        assert name in CASES
    assert f"frugax.optim.{name}" in SYMBOLS
    assert announced(name)


def test_every_number_format():
    assert set(BY_NAME) == set(MOMENTS) | set(WEIGHTS)
    for name in BY_NAME:
        assert frugax.formats.format_named(name).name == name
        assert getattr(frugax.formats, name) is BY_NAME[name]


@pytest.mark.parametrize("folder", CONFIGS)
def test_every_experiment_has_its_result(folder):
    names = [path.stem for path in (ROOT / f"experiments/configs/{folder}").glob("*.py")]
    assert names
    for name in names:
        assert (ROOT / f"experiments/benchmarks/results/{CONFIGS[folder].format(name)}.json").exists(), name
    if folder == "classify":
        assert sorted(names) == sorted(CLASSIFIERS)


def test_the_recipes_name_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    recipes = re.findall(r"^## (An? [\w ]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(recipes) == 5
    for title, body in recipes:
        steps = re.findall(r"^(\d+)\. ", body, re.MULTILINE)
        assert [int(step) for step in steps] == list(range(1, len(steps) + 1)), title
        assert len(steps) <= 8, title
        assert re.search(r"tests/\S+::test_\w+", body), title
    for test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        file, function = test
        assert (ROOT / file).exists(), file
        assert f"def {function}" in (ROOT / file).read_text() or not function, test
    for file in re.findall(r"`((?:lib|experiments|docs)/[a-z_/]+\.(?:py|md|toml))`", text):
        assert (ROOT / file).exists(), file
