"""Launching: two processes have the losses of one; sweeps and their table; dry runs; bad input."""

import json
import os
import sys
import warnings

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import launch
from experiments.launcher import local, sky, slurm
from experiments.launcher.local import commands
from experiments.launcher.sweep import grid, write_table
from experiments.train import train
from tests.devices import QUICK
from tests.errors import bound
from tests.experiments.runs import logged, tiny_config, write_corpus

CONFIG = "--config=tests/experiments/tiny.py"


@pytest.fixture
def start(capsys, monkeypatch):
    """Call experiments.launch in this process: (arguments) -> exit status and what it printed."""

    def call(*arguments) -> tuple[int, str]:
        with flagsaver.flagsaver(), warnings.catch_warnings():
            # ml_collections loads configs so.
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            flags.FLAGS.unparse_flags()
            status = launch.main(list(map(str, arguments)))
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    for name, value in {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}.items():  # of the processes it starts
        monkeypatch.setitem(os.environ, name, value)
    return call


def test_two_processes_have_the_losses_of_one(tmp_path, start):
    corpus = write_corpus(tmp_path / "corpus")
    fields = dict(steps=6, batch_size=4, accumulate=2, evaluation__every=3, sample__tokens=0)
    given = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    given += [f"--config.data.path={corpus}", f"--run={tmp_path / 'two'}"]
    status, output = start("--on=processes:2", CONFIG, *given)
    assert status == 0, output
    train(tiny_config(corpus, tmp_path / "one", **fields))

    # Only the first process writes.
    assert len([line for line in output.splitlines() if line.startswith("[0]") and "held out:" in line]) == 1
    assert not [line for line in output.splitlines() if line.startswith("[1]") and "step" in line]
    for name in ("held_out_bits_per_byte", "best_held_out_bits_per_byte"):
        one, two = (json.loads((tmp_path / run / "summary.json").read_text())[name] for run in ("one", "two"))
        np.testing.assert_allclose(one, two, rtol=10 * bound("float32"))
    expected, actual = (logged(tmp_path / name, "loss", "grad_norm") for name in ("one", "two"))
    assert len(expected) == 6
    # The same sums in another order, through six updates.
    np.testing.assert_allclose(actual, expected, rtol=10 * bound("float32"))

    # One process goes on where two stopped.
    for run in ("one", "two"):
        train(tiny_config(corpus, tmp_path / run, **fields | {"steps": 8, "evaluation__enabled": False}))
    expected, actual = (logged(tmp_path / name, "loss", "grad_norm") for name in ("one", "two"))
    assert len(expected) == 8
    np.testing.assert_allclose(actual, expected, rtol=10 * bound("float32"))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system can't tell")
def test_processes_share_the_cores_out(monkeypatch):
    here = sorted(os.sched_getaffinity(0))
    asked = [sys.executable, "-S", "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    told, _ = local.start(asked, here[-1:]).communicate()
    assert told == f"{here[-1:]}\n"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 11})
    assert local.cores_of(2) == [[2, 3], [5, 7, 11]]
    assert local.cores_of(1) == [[2, 3, 5, 7, 11]]
    assert local.cores_of(6) == [[2, 3, 5, 7, 11]] * 6


def test_a_grid_holds_every_combination_once(tmp_path):
    points = grid(["model.width=16,24", "data.path=a/b,c"], tmp_path)
    chosen = [tuple(point.fields.values()) for point in points]
    assert chosen == [("16", "a/b"), ("16", "c"), ("24", "a/b"), ("24", "c")]
    assert len({point.folder for point in points}) == 4
    assert all(point.folder.parent == tmp_path for point in points)
    assert points[0].arguments[:2] == ["--config.model.width=16", "--config.data.path=a/b"]


def test_the_table_of_a_sweep(tmp_path):
    points = grid(["seed=0,1"], tmp_path)
    points[1].folder.mkdir()
    summary = {"step": 7, "held_out_bits_per_byte": 2.34567, "training_seconds": 12.5, "jax": "0"}
    (points[1].folder / "summary.json").write_text(json.dumps(summary))
    text = write_table(points, tmp_path)
    assert text == (tmp_path / "sweep.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0] == ["seed", "steps", "bits per byte", "seconds"]
    assert rows[2:] == [["0", "", "", ""], ["1", "7", "2.346", "12.5"]]
    unfinished, finished = json.loads((tmp_path / "sweep.json").read_text())
    assert unfinished["steps"] is None
    assert finished == {"seed": "1", "steps": 7, "bits_per_byte": 2.34567, "seconds": 12.5}


def test_dry_runs_print_what_would_start(tmp_path, start):
    at = [CONFIG, f"--run={tmp_path / 'run'}", "--dry_run"]
    status, output = start(*at, "--on=processes:3", "--sweep=seed=0,1")
    lines = output.splitlines()
    assert status == 0
    assert len(lines) == 6
    for number, line in enumerate(lines):
        assert "-m experiments.train" in line
        assert f"--config.seed={number // 3}" in line
        assert f"seed={number // 3}" in line.split("--run=")[-1]
        assert line.count("--run") == 1
        assert f"--config.distributed.process={number % 3}" in line
    assert not list(tmp_path.iterdir())
    assert len(commands(["--config=x"], 1)) == 1
    assert "distributed" not in " ".join(commands(["--config=x"], 1)[0])


def test_a_dry_run_prints_the_file_for_sbatch(tmp_path, start):
    at = [CONFIG, f"--run={tmp_path / 'run'}", "--dry_run"]
    status, output = start(*at, "--on=slurm:nodes=2,ntasks_per_node=8,gpus_per_node=8,time=90,partition=long")
    assert status == 0
    lines = output.splitlines()
    assert lines[0] == "#!/bin/bash"
    for option in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=90", "partition=long"):
        assert f"#SBATCH --{option}" in lines
    (run,) = (line for line in lines if line.startswith("srun"))
    assert "--kill-on-bad-exit=1" in run
    assert "submitit.core._submit" in run
    assert "experiments.train --config=tests/experiments/tiny.py" in output
    assert "--config.distributed.enabled=True" in output
    status, output = start(*at, "--on=slurm:nodez=2")
    assert status == 1
    assert "nodez" in output
    assert "ntasks_per_node" in output  # those that there are
    with pytest.raises(ValueError, match=r"srun.*dry_run"):
        slurm.submit([CONFIG], {}, tmp_path)


def test_a_dry_run_prints_a_task_that_skypilot_accepts(tmp_path, start):
    pytest.importorskip("sky", reason="the extra `sky` is not installed")
    options = "sky:accelerators=H100:8,num_nodes=2,bucket=gs://the-bucket,job_recovery.strategy=FAILOVER"
    status, output = start(CONFIG, f"--run={tmp_path / 'run'}", "--dry_run", f"--on={options}")
    assert status == 0, output
    for line in (
        "num_nodes: 2",
        "workdir: .",
        "accelerators: H100:8",
        "strategy: FAILOVER",
        "use_spot: true",
    ):
        assert line in output
    status, output = start(CONFIG, "--dry_run", "--on=sky:accelerators=H100:8,bucket=gs://b,acelerators=1")
    assert status == 1
    assert "acelerators" in output


def test_a_task_for_a_cluster():
    """SkyPilot gets commands by which each machine knows the others; it reads no more than its schema."""
    arguments = [CONFIG, "--config.model.width=16", "--run=runs/x"]
    options = {"accelerators": "H100:8", "num_nodes": 2, "bucket": "gs://the-bucket"}
    task = sky.make_task(arguments, options, "x")
    assert task["file_mounts"] == {"/runs": {"source": "gs://the-bucket", "mode": "MOUNT"}}
    assert task["resources"]["job_recovery"]["strategy"] == "EAGER_NEXT_REGION"
    assert "--run=/runs/x" in task["run"]
    assert "runs/x" not in task["run"].replace("/runs/x", "")
    assert "$SKYPILOT_NODE_RANK" in task["run"]
    assert "cuda13" in task["setup"]
    pod = sky.make_task(arguments, {"accelerators": "tpu-v5p-64", "bucket": "gs://the-bucket"}, "x")
    assert "--config.distributed.enabled=True" in pod["run"]  # the hosts of a pod find each other
    assert "SKYPILOT" not in pod["run"]
    assert "tpu" in pod["setup"]
    with pytest.raises(ValueError, match=r"config\.data\.path: got /elsewhere; expected a path within"):
        sky.make_task([*arguments, "--config.data.path=/elsewhere"], options, "x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--on=moon"], "on: got 'moon'; expected local, processes:N, slurm or sky:OPTIONS"),
        (["--on=local:2"], "on: got 'local:2'"),
        (["--on=processes:0"], "on: got 'processes:0'; expected processes:N with N of at least 1"),
        (["--on=processes:two"], "on: got 'processes:two'"),
        (["--on=slurm:nodes"], "on: got 'nodes' in slurm:nodes; expected NAME=VALUE"),
        (["--on=sky:accelerators=H100"], "on: got sky with bucket=''; expected bucket=gs://NAME"),
        (["--on=sky:bucket=gs://a"], "on: got sky without accelerators"),
        (["--restarts=-1"], "restarts: got -1"),
        (["--on=slurm", "--restarts=1"], "restarts: got 1; expected 0 or more, and 0 for slurm"),
        (["--table"], "table: got no sweep"),
        (["--sweep=seed"], "sweep: got 'seed'; expected FIELD=VALUE,VALUE"),
        (["--sweep=seed=1,,2"], "sweep: got 'seed=1,,2'"),
        (["--sweep=seed=1,1"], "expected each value once"),
        (["--sweep=seed=1", "--sweep=seed=2"], "sweep: got seed twice"),
        (["--sweep=steps=12,-1"], "steps: got -1; expected an integer of at least 1"),
        (["more"], "'more' is no flag"),
        (["--config.distributed.timeout=0"], "distributed.timeout: got 0"),
    ],
)
def test_bad_input_is_named_before_anything_starts(start, arguments, words):
    status, output = start(CONFIG, *arguments)
    assert status == 1
    assert output.startswith("experiments.launch: ")
    assert words in output


def test_a_config_is_needed(start):
    status, output = start("--on=local")
    assert status == 1
    assert "config: got nothing; expected --config=" in output
