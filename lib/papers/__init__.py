"""`python -m frugax.papers [words]`: where a paper lives in frugax, how to call it, and its test."""

import importlib
import inspect
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple


class Paper(NamedTuple):
    """One paper: a table `[[paper]]` of the TOML file that its family has in this folder."""

    slug: str
    title: str
    arxiv: str  # identifier, e.g. "2312.06635"
    year: int  # of the first version on arXiv
    family: str  # the name of its file
    symbols: tuple[str, ...]  # dotted names of what implements it, e.g. "frugax.layers.Retention"
    tests: tuple[str, ...]  # pytest node ids of what shows that it works
    left_out: str  # what of the paper's method or measurements is not here; "nothing": it is whole
    note: str = ""  # what differs, and what was measured


def families() -> dict[str, str]:
    """Map the name of each family to a line on what it holds.

    Source: the TOML files of lib/papers/.

    Example:
        >>> from frugax.papers import families
        >>> families()["peft"]
        'adapters over any tree of params'
    """
    return {file["family"]: file["about"] for file in _files()}


def papers() -> list[Paper]:
    """List every paper that frugax answers to, family after family.

    Source: the TOML files of lib/papers/.

    Example:
        >>> from frugax.papers import papers
        >>> next(p.symbols[0] for p in papers() if p.arxiv == "2312.06635")
        'frugax.kernels.linear_attention'
    """
    found = []
    for file in _files():
        for row in file["paper"]:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
            found.append(Paper(**values, family=file["family"]))
    return found


def _files() -> list[dict[str, Any]]:
    paths = (path for path in resources.files(__package__).iterdir() if path.name.endswith(".toml"))
    return [tomllib.loads(p.read_text(encoding="utf-8")) for p in sorted(paths, key=lambda p: p.name)]


def find(words: Sequence[str]) -> list[Paper]:
    """Find the papers that contain every word in any field, whatever the case: first one with that slug."""
    wanted = [word.lower() for word in words]
    found = [p for p in papers() if all(word in " ".join(map(str, p)).lower() for word in wanted)]
    return sorted(found, key=lambda paper: paper.slug not in wanted)


def resolve(symbol: str) -> Any:
    """Import the object that a dotted name stands for; raise ValueError if there is none."""
    parts = symbol.split(".")
    found = importlib.import_module(parts[0])
    for part in parts[1:]:
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ValueError(f"symbol: got {symbol!r}; expected a dotted name that exists") from None
    return found


def describe(paper: Paper) -> str:
    """Print-ready text: the title, each symbol's call and first line, the tests, and what is left out."""
    lines = [f"{paper.slug}: {paper.title} (arXiv {paper.arxiv}, {paper.year}, {paper.family})"]
    for symbol in paper.symbols:
        found = resolve(symbol)
        summary = (inspect.getdoc(found) or "").splitlines()[:1]
        lines += [f"  {symbol}{_arguments(found)}", *(f"    {line}" for line in summary)]
    lines += [f"  test: {test}" for test in paper.tests]
    lines.append("  whole: nothing is left out" if whole(paper) else f"  left out: {paper.left_out}")
    lines += [f"  note: {paper.note}"] if paper.note else []
    return "\n".join(lines)


def whole(paper: Paper) -> bool:
    """Test if all that the paper defines and measures is here, on the scale that a test can have."""
    return paper.left_out == "nothing"


def _arguments(found: Any) -> str:
    own = ("parent", "name")  # what every Flax module has
    parameters = [p for p in inspect.signature(found).parameters.values() if p.name not in own]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain))
