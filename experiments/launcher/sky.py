"""Jobs of clouds, through SkyPilot: TPU pods and clusters of GPUs, on spot machines if you say so."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.launcher.local import without_run

RUNS = "/runs"  # on the machines: where the bucket is mounted
_PORT = 8476
_TASK = ("name", "num_nodes", "workdir", "setup")  # the other overrides are the resources'


def make_task(arguments: Sequence[str], options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The task of one run, as a dict of SkyPilot's YAML.

    Spot machines that go away are replaced (`job_recovery`), and the run goes on from its last checkpoint in
    the bucket.

    Args:
      arguments: flags of `experiments.train`; --run among them is ignored.
      options: bucket ("gs://NAME" or "s3://NAME/FOLDER"; needed), accelerators ("tpu-v5p-64", "H100:8"), and
        further fields of a task's resources (use_spot, infra, disk_size, job_recovery.strategy, ...) or of
        the task (name, num_nodes, setup).
      name: of the run: its folder in the bucket, and the task's name.

    Raises:
      ValueError: there is no bucket, no accelerators, or a path that the machines would not have.
    """
    options = dict(options)
    bucket, accelerators = (str(options.get(key, "")) for key in ("bucket", "accelerators"))
    options.pop("bucket", None)
    if "://" not in bucket:
        raise ValueError(f"on: got sky with bucket={bucket!r}; expected bucket=gs://NAME or another store's")
    if not accelerators:
        raise ValueError("on: got sky without accelerators; expected accelerators=tpu-v5p-64, H100:8, ...")
    is_tpu = accelerators.startswith("tpu")
    task: dict[str, Any] = {"name": name, "num_nodes": 1, "workdir": "."}
    # Spot or not: what ends is started again, elsewhere if need be, and errors of the program three times.
    resources: dict[str, Any] = {
        "use_spot": True,
        "job_recovery": {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 3},
    }
    for key, value in options.items():
        *above, last = key.split(".")
        node = task if key in _TASK else resources
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    extra = "tpu" if is_tpu else "cuda13"
    task.setdefault(
        "setup",
        "pip install -q uv\n"
        "uv venv -q --allow-existing --python 3.12 ~/frugax\n"
        f"uv pip install -q --python ~/frugax/bin/python '.[experiments,{extra}]'\n",
    )
    kept = without_run(arguments)
    _check_paths(kept)
    words = ["~/frugax/bin/python -m experiments.train", *map(shlex.quote, kept)]
    words.append(f"--run={shlex.quote(f'{RUNS}/{name}')}")
    if is_tpu:  # whose hosts find each other
        words.append("--config.distributed.enabled=True")
    elif task["num_nodes"] != 1:
        words += [
            "--config.distributed.enabled=True",
            f'--config.distributed.coordinator="$(head -n1 <<<"$SKYPILOT_NODE_IPS"):{_PORT}"',
            "--config.distributed.processes=$SKYPILOT_NUM_NODES",
            "--config.distributed.process=$SKYPILOT_NODE_RANK",
        ]
    task |= {
        "resources": {"accelerators": accelerators} | resources,
        "file_mounts": {RUNS: {"source": bucket, "mode": "MOUNT"}},
        "run": " \\\n  ".join(words) + "\n",
    }
    return task


def check_task(task: Mapping[str, Any]) -> Any:
    """The `sky.Task` of a dict.

    Raises:
      ValueError: SkyPilot is not installed, or refuses the task.
    """
    try:
        import sky
    except ImportError as error:
        raise ValueError("on: got sky without SkyPilot; expected pip install 'frugax[sky]'") from error
    try:
        return sky.Task.from_yaml_config(dict(task))
    except Exception as error:  # several of SkyPilot's own
        raise ValueError(f"on: SkyPilot refuses the task: {error}") from error


def as_yaml(task: Mapping[str, Any]) -> str:
    """A task as text, for `sky jobs launch FILE`."""
    import yaml  # SkyPilot's

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper, value):
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump(dict(task), Dumper=Dumper, sort_keys=False, width=1000)


def submit(task: Mapping[str, Any]) -> str:
    """Start a managed job, which SkyPilot recovers, and return what it says of it."""
    import sky

    request = sky.jobs.launch(check_task(task), name=task["name"])
    ids, _ = sky.stream_and_get(request)
    return f"job {', '.join(map(str, ids or []))}"


def _check_paths(arguments: Sequence[str]) -> None:
    here = Path.cwd().resolve()
    for argument in arguments:
        name, _, path = argument.partition("=")
        if name in ("--config", "--config.data.path", "--config.data.tokenizer") and path:
            there = Path(path.partition(":")[0] if name == "--config" else path)
            if there.is_absolute() or not (here / there).resolve().is_relative_to(here):
                raise ValueError(f"{name[2:]}: got {path}; expected a path within {here}, which is copied")
