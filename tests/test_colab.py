"""The notebooks in colab/: each is its script, calls nothing private, and runs from top to bottom."""

import ast
import os
import re
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")  # the `notebooks` extra
nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")

FOLDER = Path(__file__).parents[1] / "colab"
SCRIPTS = sorted(FOLDER.glob("*.py"))
# What a reader of the notebooks can look up: documented packages, and Python's own.
PACKAGES = {"frugax", "jax", "matplotlib", "numpy", "optax", "tqdm"}
STANDARD = {"gzip", "importlib", "math", "pathlib", "subprocess", "sys", "sysconfig"}
BADGE = "https://colab.research.google.com/github/frugax/frugax/blob/main/colab/{}.ipynb"

by_name = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


@by_name
def test_a_notebook_is_its_script_without_outputs(script):
    """`jupytext --sync colab/*.py` makes it so; outputs stay out of the repository."""
    of_script = jupytext.read(script)
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    cells = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (of_script, notebook)]
    assert cells[0] == cells[1]
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_every_notebook_has_a_script():
    assert len(SCRIPTS) >= 2
    assert sorted(notebook.with_suffix(".py") for notebook in FOLDER.glob("*.ipynb")) == SCRIPTS


@by_name
def test_a_notebook_opens_in_colab_installs_first_and_says_what_to_look_for(script):
    cells = jupytext.read(script).cells
    assert f"]({BADGE.format(script.stem)})" in cells[0].source
    first = next(cell.source for cell in cells if cell.cell_type == "code")
    assert 'find_spec("frugax") is None' in first
    assert "git+https://github.com/frugax/frugax" in first
    assert any("**Look for:**" in cell.source for cell in cells)


@by_name
def test_a_notebook_calls_only_what_is_public(script):
    tree = ast.parse(script.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] in PACKAGES | STANDARD
                assert not alias.name.startswith("frugax.")
        elif isinstance(node, ast.ImportFrom):
            assert node.module in PACKAGES | STANDARD
        elif isinstance(node, ast.Attribute):
            assert not re.match(r"_[^_]", node.attr)


@by_name
def test_what_a_notebook_names_of_frugax_is_exported(script):
    import frugax

    for package, name in re.findall(r"\bfrugax\.(\w+)\.(\w+)", script.read_text()):
        assert name in getattr(frugax, package).__all__


@pytest.mark.full
@by_name
def test_a_notebook_runs(script, monkeypatch):
    """In a kernel of its own, as a reader would run it."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(FOLDER))
    printed = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert printed
    assert not [o for o in printed if o.output_type == "error"]
