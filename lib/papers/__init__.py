"""`python -m frugax.papers [words]`: where a paper lives in frugax, how to call it, and its test."""

import importlib
import inspect
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple


class Paper(NamedTuple):
    """A row of papers.toml."""

    slug: str
    title: str
    symbols: tuple[str, ...]  # dotted names of what implements it, e.g. "frugax.layers.Retention"
    tests: tuple[str, ...]  # pytest node ids of what shows that it works
    note: str = ""  # what is left out, or differs


def papers() -> list[Paper]:
    """Every paper that frugax answers to.

    Source: lib/papers/papers.toml.

    Example:
        >>> from frugax.papers import papers
        >>> next(p.symbols[0] for p in papers() if p.slug == "gla")
        'frugax.kernels.linear_attention'
    """
    rows = tomllib.loads(resources.files(__package__).joinpath("papers.toml").read_text())["paper"]
    return [Paper(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}) for row in rows]


def find(words: Sequence[str]) -> list[Paper]:
    """The papers whose slug, title, symbols or note contain every word, whatever the case."""
    wanted = [word.lower() for word in words]
    return [p for p in papers() if all(word in " ".join(map(str, p)).lower() for word in wanted)]


def resolve(symbol: str) -> Any:
    """The object that a dotted name stands for. Raises ValueError if there is none."""
    parts = symbol.split(".")
    found = importlib.import_module(parts[0])
    for part in parts[1:]:
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ValueError(f"symbols: {symbol!r} does not exist") from None
    return found


def describe(paper: Paper) -> str:
    """A paper's title, and for each symbol its call and first line of documentation; then its tests."""
    lines = [f"{paper.slug}: {paper.title}"]
    for symbol in paper.symbols:
        found = resolve(symbol)
        summary = (inspect.getdoc(found) or "").splitlines()[:1]
        lines += [f"  {symbol}{_arguments(found)}", *(f"    {line}" for line in summary)]
    lines += [f"  test: {test}" for test in paper.tests]
    lines += [f"  note: {paper.note}"] if paper.note else []
    return "\n".join(lines)


def _arguments(found: Any) -> str:
    own = ("parent", "name")  # what every Flax module has
    parameters = [p for p in inspect.signature(found).parameters.values() if p.name not in own]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain))
