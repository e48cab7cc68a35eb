"""A benchmark's job in a process of its own, with this checkout's frugax or an earlier one's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def in_a_process(module: str, *job: str, before: Path | None) -> dict[str, Any]:
    """Read the JSON of `python -m module --job JOB...`, with the frugax in the folder `before` if given.

    Raises:
      AssertionError: the process ran another frugax; its JSON names the file in "frugax".
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | ({} if before is None else {"PYTHONPATH": str(before)})
    command = [sys.executable, "-m", module, "--job", *job]
    found = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
    if before is not None and Path(found["frugax"]).parent.resolve() != (before / "frugax").resolve():
        raise AssertionError(f"--before: {before} was to be measured, not {found['frugax']}")
    return found


def commit(before: Path) -> str:
    """The commit at which the folder's frugax stands."""
    command = ["git", "-C", str(before / "frugax"), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
