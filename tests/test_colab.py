"""The notebooks in colab/: each is its script, calls nothing private, and runs from top to bottom."""

import ast
import json
import os
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "colab"
SCRIPTS = sorted(FOLDER.glob("*.py"))
# What a reader of the notebooks can look up: documented packages, and Python's own.
PACKAGES = {"frugax", "jax", "matplotlib", "numpy", "optax", "tqdm"}
STANDARD = {"gzip", "importlib", "math", "pathlib", "subprocess", "sys", "sysconfig", "tempfile"}
BADGE = "https://colab.research.google.com/github/frugax/frugax/blob/main/colab/{}.ipynb"

by_name = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def cells_of(script: Path) -> list[tuple[str, str]]:
    """Kinds and sources of a script's cells, read as jupytext does, which the default tier needn't have."""
    cells = []
    for part in re.split(r"^# %%", script.read_text(), flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head == " [markdown]":
            cells.append(("markdown", re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)))
        else:
            cells.append(("code", body.strip()))
    return cells


@by_name
def test_a_notebook_is_its_script_without_outputs(script):
    """`jupytext --sync colab/*.py` makes it so; outputs stay out of the repository."""
    cells = json.loads(script.with_suffix(".ipynb").read_text())["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == cells_of(script)
    for cell in cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_every_notebook_has_a_script():
    assert len(SCRIPTS) >= 2
    assert sorted(notebook.with_suffix(".py") for notebook in FOLDER.glob("*.ipynb")) == SCRIPTS


@by_name
def test_a_notebook_opens_in_colab_installs_first_and_says_what_to_look_for(script):
    cells = cells_of(script)
    assert f"]({BADGE.format(script.stem)})" in cells[0][1]
    first = next(source for kind, source in cells if kind == "code")
    assert 'find_spec("frugax") is None' in first
    assert "git+https://github.com/frugax/frugax" in first
    assert any("**Look for:**" in source for _, source in cells)


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
    """In a kernel of its own, as a reader would run it, and jupytext itself finds it in sync."""
    import jupytext
    import nbclient
    import nbformat

    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    assert [cell.source for cell in jupytext.read(script).cells] == [cell.source for cell in notebook.cells]
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(FOLDER))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
