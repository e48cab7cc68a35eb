"""Small runs of experiments.train for the tests: in this process, or in one that can be killed."""

import contextlib
import inspect
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

from absl import app, flags
from absl.testing import flagsaver

from experiments.trainer.flags import run
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


def call(main, *arguments: str) -> tuple[int, str]:
    """The exit status and the output of a main of absl's with these flags, in this process."""
    app.define_help_flags()  # before the flags are saved: absl defines them once
    printed, argv = io.StringIO(), sys.argv
    with (
        flagsaver.flagsaver(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)  # ml_collections loads so
        flags.FLAGS.unparse_flags()
        sys.argv = [main.__module__, *map(str, arguments)]  # where the flags of a config look for its fields
        try:
            run(main, sys.argv)
        except SystemExit as end:
            status = end.code
        finally:
            sys.argv = argv
    if isinstance(status, str):  # what sys.exit prints as the interpreter ends
        return 1, f"{printed.getvalue()}{status}\n"
    return status or 0, printed.getvalue()


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
