"""Shared parts of generated pages: a result, a Markdown table, and a line on where a result was measured."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BY_TURNS = "Contenders run by turns; a ratio is the median over turns, not the ratio of the medians."


def read(name: str) -> Any:
    """Load experiments/benchmarks/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Write rows as a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def plain_caption(result: dict[str, Any]) -> str:
    """Name machine, version and date of a result whose machine is one string."""
    return f"{result['machine']}, jax {result['jax']}, {result['date']}."


def caption(result: dict[str, Any]) -> str:
    """Name benchmark, machine, versions and date of a result that lists its versions."""
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    machine = result["machine"]
    where = f"{machine['cores']} cores of {machine['model']}"
    return f"{result['benchmark']}. {where}, {versions}, {result['date']}."
