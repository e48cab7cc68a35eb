"""Jobs, each in a process of its own: a crash costs that job, a hang the seconds that it was given.

Nothing of JAX is imported here, so that what fails there fails in a job.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LEAST = 5.0  # seconds: no job is started for less
LINES = 12  # of an error, in the summary
LOG_CHARACTERS = 20_000  # of a job's output, its end

PASSED, FAILED, CRASHED = "passed", "failed", "crashed"
TIMED_OUT, OUT_OF_TIME, LEFT_OUT = "timed out", "out of time", "left out"


@dataclasses.dataclass(frozen=True)
class Job:
    """A command; `{output}` in its arguments stands for the JSON file that it writes, again as it goes on."""

    name: str
    command: tuple[str, ...]
    seconds: float  # after which it is ended
    output: str = ""  # the file's name, which jobs may share: later ones go on with it


@dataclasses.dataclass
class Outcome:
    """The state of a job, which changes while it runs."""

    job: Job
    status: str = "waiting"
    seconds: float = 0.0
    error: str = ""  # its first lines
    log: str = ""  # the end of what it printed
    result: Any = None  # the JSON that it has written so far


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole at every moment."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def read_json(path: Path) -> Any:
    """Return the file's value; None if there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def run_all(
    jobs: Sequence[Job],
    *,
    folder: Path,
    until: float,
    environment: Mapping[str, str],
    changed: Callable[[Outcome], None],
    at_once: int = 1,
) -> list[Outcome]:
    """Run the jobs in their order, `at_once` side by side, and return how each ended.

    Args:
      folder: where the jobs' outputs go.
      until: the `time.monotonic()` at which the last has to end. A job is not started in the five seconds
        before it.
      environment: of the processes.
      changed: called with an outcome when its job starts, has written its output anew, and ends; one call at
        a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [Outcome(job) for job in jobs]
    lock = threading.Lock()

    def tell(outcome: Outcome) -> None:
        with lock:
            changed(outcome)

    def run(outcome: Outcome) -> None:
        _run(outcome, folder, until, environment, tell)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, outcomes))
    return outcomes


def _run(
    outcome: Outcome,
    folder: Path,
    until: float,
    environment: Mapping[str, str],
    changed: Callable[[Outcome], None],
) -> None:
    job, start = outcome.job, time.monotonic()
    left = until - start
    if left < LEAST:
        outcome.status = LEFT_OUT
        return changed(outcome)
    path = folder / (job.output or "unused")
    outcome.status = "running"
    changed(outcome)
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [argument.replace("{output}", str(path)) for argument in job.command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, which is ended as a whole
        )
        end = start + min(job.seconds, left)
        try:
            while process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.01, min(1.0, end - time.monotonic())))
                if job.output and (result := read_json(path)) not in (None, outcome.result):
                    outcome.result = result
                    changed(outcome)
        finally:
            code = process.poll()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - LOG_CHARACTERS))
        outcome.log = printed.read().decode(errors="replace")
    outcome.seconds = round(time.monotonic() - start, 1)
    if job.output:
        outcome.result = read_json(path)
    outcome.status = _status(code, cut=left < job.seconds)
    if outcome.status != PASSED:
        outcome.error = _error(outcome, code)
    changed(outcome)


def _status(code: int | None, cut: bool) -> str:
    if code is None:
        return OUT_OF_TIME if cut else TIMED_OUT
    return PASSED if code == 0 else FAILED if code == 1 else CRASHED


def _error(outcome: Outcome, code: int | None) -> str:
    """The first lines of the error, or the last lines that were printed."""
    head = f"ended after {outcome.seconds} s" if code is None else f"ended with {code}"
    if code is not None and code < 0:
        head = f"ended by {signal.Signals(-code).name}"
    return "\n".join([head, *first_lines(outcome.log)])


def first_lines(log: str) -> list[str]:
    """Return the lines from the last exception's on, or those at the end where there is none.

    Example:
        >>> first_lines("Traceback (most recent call last):\\n  File ...\\nValueError: no\\n  more")
        ['ValueError: no', '  more']
    """
    lines = [line[:300] for line in log.splitlines() if line.strip()]
    raised = [
        n for n, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)
    ]
    if raised and any(line.startswith("Traceback") for line in lines):
        return lines[raised[-1] :][:LINES]
    return lines[-LINES:]
