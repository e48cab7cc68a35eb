"""Small runs of experiments.train for the tests: in this process, or in one that can be killed."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.devices import QUICK
from tests.experiments import tiny

ROOT = Path(__file__).parents[2]


def write_corpus(folder: Path) -> Path:
    """A few files of Python that every interpreter has."""
    folder.mkdir()
    for module in (inspect, json, os, subprocess):
        text = Path(module.__file__).read_text(encoding="utf-8")[:6000]
        (folder / f"{module.__name__}.py").write_text(text, encoding="utf-8")
    return folder


def tiny_config(corpus: Path, run_dir: Path, **changes):
    """The config of tests/experiments/tiny.py; `changes` are fields, with __ for the dots."""
    config = tiny.get_config()
    fields = {"data.path": str(corpus), "run_dir": str(run_dir)}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(fields)
    return config


def command(corpus: Path, run_dir: Path, **changes) -> list[str]:
    """The same config as `tiny_config`, as a command line."""
    fields = {"data.path": corpus} | {name.replace("__", "."): value for name, value in changes.items()}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    program = [sys.executable, "-m", "experiments.train"]
    return [*program, "--config=tests/experiments/tiny.py", f"--run={run_dir}", *flags]


def start(arguments: list[str], *, xla_flags: str = "") -> subprocess.Popen:
    """Start a command in the repository's root, on CPU, with a compiler that hurries."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{xla_flags} {QUICK}"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(arguments, cwd=ROOT, env=env, **pipes)


def finish(process: subprocess.Popen, *, status: int = 0) -> str:
    """Wait for a process and return what it printed; it must end with `status`."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == status, output
    return output


def logged(run_dir: Path, *names: str) -> list[tuple]:
    """(step, the named metrics) of every line of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], *(line[name] for name in names)) for line in lines]
