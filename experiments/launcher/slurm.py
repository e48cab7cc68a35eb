"""Jobs of a Slurm cluster, through submitit."""

import importlib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A process that fails ends the job's other processes.
_DEFAULTS = {"nodes": 1, "ntasks_per_node": 1, "srun_args": ["--kill-on-bad-exit=1"]}


class Training:
    """A run of `experiments.train` in each task of a job; a job that is preempted or out of time goes on."""

    def __init__(self, arguments: Sequence[str]):
        self.arguments = list(arguments)

    def __call__(self) -> None:
        """Train, from the last checkpoint."""
        from experiments import train
        from experiments.trainer.flags import parse

        try:
            train.main(parse(["experiments.train", *self.arguments]))
        except SystemExit as end:  # submitit waits for a result, or an error
            if end.code:
                raise RuntimeError(end.code) from end

    def checkpoint(self):
        """The call that continues this one, for submitit to queue: the run's checkpoints are on disk."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Training(self.arguments))


def sbatch_file(arguments: Sequence[str], options: Mapping[str, Any], folder: str | Path) -> str:
    """The file that `submit` would hand to sbatch, and what its tasks do."""
    executor, arguments = _executor(arguments, options, folder, needs_slurm=False)
    text = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    return f"{text}\n# in each task: python -m experiments.train {shlex.join(arguments)}\n"


def submit(arguments: Sequence[str], options: Mapping[str, Any], folder: str | Path) -> str:
    """Submit a job and return its id.

    Args:
      arguments: flags of `experiments.train`.
      options: submitit's parameters of Slurm: nodes, ntasks_per_node, gpus_per_node, partition, mem, time
        (minutes), ...; every task is a process.
      folder: of its logs.

    Raises:
      ValueError: an option that submitit does not know, or no Slurm here.
    """
    executor, arguments = _executor(arguments, options, folder, needs_slurm=True)
    return executor.submit(Training(arguments)).job_id


def import_submitit() -> Any:
    """The package, kept from configuring logging: that would close absl's handlers, and with them stderr."""
    ours = "SUBMITIT_LOG_LEVEL" not in os.environ
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise ValueError("on: got slurm without submitit; expected pip install 'frugax[launch]'") from error
    finally:
        if ours:
            del os.environ["SUBMITIT_LOG_LEVEL"]  # the job may log


def _executor(
    arguments: Sequence[str], options: Mapping[str, Any], folder: str | Path, *, needs_slurm: bool
) -> tuple[Any, list[str]]:
    """Make submitit's executor, and the flags of each task: several tasks meet, as JAX finds in Slurm."""
    executor_class = import_submitit().SlurmExecutor
    if not needs_slurm:  # it writes the file on machines without Slurm too
        executor_class = type("Anywhere", (executor_class,), {"affinity": classmethod(lambda _: 2)})
    try:
        executor = executor_class(folder=folder)
    except RuntimeError as error:
        raise ValueError(f"on: got slurm; {error} Expected a machine that submits, or --dry_run") from error
    try:
        executor.update_parameters(**_DEFAULTS | dict(options))
    except (ValueError, TypeError) as error:
        raise ValueError(f"on: got slurm:{_joined(options)}; {error}") from error
    several = executor.parameters["nodes"] * executor.parameters["ntasks_per_node"] > 1
    return executor, [*arguments, *(["--config.distributed.enabled=True"] * several)]


def _joined(options: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())
