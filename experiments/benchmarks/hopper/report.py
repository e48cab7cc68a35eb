"""The record of a run, written again at every change, and its summary."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .jobs import CRASHED, FAILED, LEFT_OUT, OUT_OF_TIME, TIMED_OUT, Outcome, write_json, write_text

WRONG = (FAILED, CRASHED, TIMED_OUT)
UNDECIDED = (OUT_OF_TIME, LEFT_OUT)


class Record:
    """Write the end of every job to `DIR/hopper.json` and `DIR/summary.txt`: two files for any number."""

    def __init__(self, folder: Path, title: str, whole: bool = False):
        self.folder, self.title, self.whole = folder, title, whole
        self.machine: Any = None
        self.outcomes: dict[str, Outcome] = {}
        self.lock = threading.Lock()

    def changed(self, outcome: Outcome) -> None:
        """Write both files, and print what ended."""
        with self.lock:
            self.outcomes[outcome.job.name] = outcome
            write_json(self.folder / "hopper.json", self.as_json())
            write_text(self.folder / "summary.txt", self.summary())
        if outcome.status not in ("running", "waiting"):
            print(f"{outcome.status:12} {outcome.seconds:6.1f} s  {outcome.job.name}", flush=True)

    def as_json(self) -> dict[str, Any]:
        """Return the whole record; what jobs wrote, by the name of the file."""
        jobs = [
            {"name": o.job.name, "status": o.status, "seconds": o.seconds}
            | ({"error": o.error, "log": o.log} if o.error else {})
            for o in self.outcomes.values()
        ]
        results = {o.job.output: o.result for o in self.outcomes.values() if o.result is not None}
        return {"run": self.title, "machine": self.machine, "jobs": jobs, "results": results}

    def wrong(self) -> list[Outcome]:
        """Return the jobs that failed, and those not reached: of conformance, or any where all are wanted."""
        needed = [o for o in self.outcomes.values() if self.whole or is_conformance(o)]
        return [
            o for o in self.outcomes.values() if o.status in WRONG or (o.status in UNDECIDED and o in needed)
        ]

    def summary(self) -> str:
        """Return what failed and why, what was left out, and what was measured."""
        found = list(self.outcomes.values())
        count = {
            status: sum(o.status == status for o in found) for status in sorted({o.status for o in found})
        }
        lines = [self.title, ", ".join(f"{n} {status}" for status, n in count.items())]
        if self.machine:
            lines.append(f"{self.machine['chip']}, {self.machine['date']}, {self.machine['versions']}")
        for o in found:
            if o.status in WRONG:
                lines += ["", f"{o.status.upper()}: {o.job.name}", *wrong_cases(o.result)]
                lines += [f"    {line}" for line in o.error.splitlines()]
        undecided = [f"    {o.job.name} ({o.status})" for o in found if o.status in UNDECIDED]
        lines += ["", "Not finished when the minutes were used up:", *undecided] if undecided else []
        lines += ["", *measured(found)]
        return "\n".join(lines) + "\n"


def is_conformance(outcome: Outcome) -> bool:
    """Say if the job decides whether a kernel is right."""
    return not outcome.job.output.startswith("gpu_")


def wrong_cases(result: Any) -> list[str]:
    """Return a line for each case of a conformance job that is wrong."""
    cases = [row for row in result if "case" in row] if isinstance(result, list) else []
    return [
        f"    {row['case']}: {row.get('problem') or worst(row['errors'], row['bound'])}"
        for row in cases
        if not row["right"]
    ]


def worst(errors: dict[str, float], limit: float) -> str:
    """Return the errors above the limit."""
    return f"{ {name: e for name, e in errors.items() if not e <= limit} } above {limit}"


def measured(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line for each row of the benchmarks: milliseconds, ratios, and who was not timed and why."""
    files = {o.job.output: o.result for o in outcomes if not is_conformance(o) and isinstance(o.result, dict)}
    lines = []
    for name, result in files.items():
        lines.append(name)
        for row in result["rows"]:
            named = {k: v for k, v in row.items() if not isinstance(v, dict | float) and "copy" not in k}
            found = [" ".join(f"{k}={v}" for k, v in named.items())]
            if "median_ms" in row:
                times = ", ".join(f"{who} {ms}" for who, ms in row["median_ms"].items()) or "not timed"
                found[0] += f": {times} ms"
            found += [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)]
            lines.append(f"    {'; '.join(found)}")
            untimed = [who for who in row.get("errors", {}) if who not in row["median_ms"]]
            lines += [f"        {who}: {str(row['errors'][who])[:150]}" for who in untimed]
    return lines


def keep(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write each benchmark's result of a record on its own, as the project keeps it."""
    found = {name: x for name, x in record["results"].items() if name.startswith("gpu_")}
    for name, result in found.items():
        write_json(folder / name, result)
    return [folder / name for name in found]
