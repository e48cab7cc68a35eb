"""Sweeps: a grid of overrides of a config, each point a run in its own folder, and one table of all."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.markdown import table
from experiments.launcher.local import flags_of


class Point(NamedTuple):
    """One run of a sweep."""

    fields: dict[str, str]  # by the field's path: optimizer.learning_rate
    folder: Path

    @property
    def arguments(self) -> list[str]:
        """Flags of `experiments.train`, to come after those that all points share."""
        return [*flags_of(self.fields), f"--run={self.folder}"]


def grid(sweeps: Sequence[str], folder: str | Path) -> list[Point]:
    """Every combination of values, the last field changing fastest.

    Args:
      sweeps: "a.b=1,2" each: a field and its values.
      folder: of the sweep; the points' folders lie in it.

    Example:
        >>> [point.folder.name for point in grid(["seed=0,1", "model.width=16"], "runs/x")]
        ['seed=0,model.width=16', 'seed=1,model.width=16']
    """
    values: dict[str, list[str]] = {}
    for text in sweeps:
        name, equals, listed = text.partition("=")
        if not name or not equals or "" in listed.split(","):
            raise ValueError(f"sweep: got {text!r}; expected FIELD=VALUE,VALUE such as model.width=64,128")
        if name in values:
            raise ValueError(f"sweep: got {name} twice; expected all its values in one list")
        values[name] = listed.split(",")
    points = []
    for chosen in itertools.product(*values.values()):
        fields = dict(zip(values, chosen, strict=True))
        named = ",".join(f"{name}={value}" for name, value in fields.items()).replace("/", "_")
        points.append(Point(fields, Path(folder) / named))
    if len({point.folder for point in points}) < len(points):
        raise ValueError(f"sweep: got {sweeps}; expected each value once")
    return points


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary.json of a finished run; empty where there is none."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_table(points: Sequence[Point], folder: str | Path) -> str:
    """Write FOLDER/sweep.json and FOLDER/sweep.md of what the points have reached, and return the latter.

    Bits per byte are those of the held-out text; seconds those of the steps, since the run last started.
    """
    rows = []
    for point in points:
        summary = read_summary(point.folder)
        rows.append(
            point.fields
            | {
                "steps": summary.get("step"),
                "bits_per_byte": summary.get("held_out_bits_per_byte"),
                "seconds": summary.get("training_seconds"),
            }
        )
    head = [name.replace("_", " ") if name in ("bits_per_byte",) else name for name in rows[0]]
    text = table(head, [[_shown(value) for value in row.values()] for row in rows]) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (folder / "sweep.md").write_text(text, encoding="utf-8")
    return text


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
