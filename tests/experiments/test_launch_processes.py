"""Several real processes: resized, killed, stopped, started again; and those that can't agree or meet."""

import os
import signal
import socket
import threading
import time

import numpy as np
import pytest

from experiments.launcher import local, slurm
from experiments.launcher.sweep import read_summary
from experiments.train import train
from tests.devices import QUICK
from tests.errors import bound
from tests.experiments.runs import command, finish, logged, start, tiny_config, write_corpus
from tests.experiments.test_launch import CONFIG
from tests.experiments.test_launch import start as launch  # noqa: F401, a fixture

pytestmark = pytest.mark.full
FIELDS = dict(batch_size=16, checkpoint__every=3, evaluation__enabled=False, sample__tokens=0)
BITS = ("loss", "grad_norm", "update_norm", "bits_per_byte", "learning_rate")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def on_one_device(corpus, tmp_path_factory):
    """The run that the resized ones are compared with: three steps, three more, and three more."""
    folder = tmp_path_factory.mktemp("one")
    for steps in (3, 6, 9):  # the schedule is that of each part
        train(tiny_config(corpus, folder, **FIELDS, steps=steps))
    return logged(folder, "loss", "grad_norm")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Settings of the processes that a test starts."""
    for name, value in {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}.items():
        monkeypatch.setitem(os.environ, name, value)


def flags(corpus, run, **fields) -> list[str]:
    """Flags of experiments.train."""
    return command(corpus, run, **fields)[3:]


def close(run, expected) -> None:
    actual = logged(run, "loss", "grad_norm")
    assert len(actual) == len(expected)
    np.testing.assert_allclose(actual, expected, rtol=10 * bound("float32"))


def test_eight_devices_then_four_then_sixteen(corpus, tmp_path, on_one_device):
    for steps, devices in ((3, 8), (6, 4), (9, 16)):
        fields = dict(FIELDS, steps=steps, mesh__data=2, mesh__fsdp=-1)
        flag = f"--xla_force_host_platform_device_count={devices}"
        finish(start(command(corpus, tmp_path, **fields), xla_flags=flag))
    close(tmp_path, on_one_device)


def test_four_processes_then_two_that_share_rows(corpus, tmp_path, on_one_device):
    for steps, count, mesh in ((3, 4, {}), (6, 2, {}), (9, 2, dict(mesh__data=1, mesh__tensor=2))):
        local.run_job(flags(corpus, tmp_path, **FIELDS, steps=steps, **mesh), count)
    close(tmp_path, on_one_device)


def kill_at(run, step: int, victim: int, which=signal.SIGKILL):
    """For `started`: signal a process once the run has logged this step."""

    def started(ids):
        def wait():
            while not (run / "metrics.jsonl").exists() or len(logged(run)) < step:
                time.sleep(0.01)
            os.kill(ids[victim] if victim >= 0 else os.getpid(), which)

        if len(killers) == 0:
            killers.append(threading.Thread(target=wait, daemon=True))
            killers[0].start()

    killers: list[threading.Thread] = []
    return started


def test_a_killed_process_is_named_and_the_job_goes_on(corpus, tmp_path, tmp_path_factory):
    fields = dict(FIELDS, batch_size=2, steps=120, checkpoint__every=10)
    whole = tmp_path_factory.mktemp("whole")
    local.run_job(flags(corpus, whole, **fields), 2)
    begun: list[list[int]] = []
    kill = kill_at(tmp_path, 40, victim=1)

    def begin_and_kill(ids):
        kill(ids)
        begun.append(ids)

    given = flags(corpus, tmp_path, **fields)
    with pytest.raises(local.Died, match="process 1 of 2 was killed by SIGKILL, and the others were ended"):
        local.run_job(given, 2, started=begin_and_kill)
    assert all(not os.path.exists(f"/proc/{number}") for number in begun[0])
    assert 40 <= len(logged(tmp_path)) < 120

    lines: list[str] = []  # the other one is killed, and the job starts by itself
    at = len(logged(tmp_path)) + 20
    local.run_job(given, 2, restarts=1, say=lines.append, started=kill_at(tmp_path, at, victim=0))
    assert any("process 0 of 2 was killed by SIGKILL" in line and "0 restarts left" in line for line in lines)
    assert logged(tmp_path, *BITS) == logged(whole, *BITS)  # bit for bit, and every step once


def test_sigterm_saves_on_all_processes(corpus, tmp_path):
    given = flags(corpus, tmp_path, **FIELDS | {"steps": 100_000, "checkpoint__every": 0})
    lines: list[str] = []
    stop = kill_at(tmp_path, 20, victim=-1, which=signal.SIGTERM)  # this process gets it
    with pytest.raises(local.Stopped):
        local.run_job(given, 2, say=lines.append, started=stop)
    (saved,) = (int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert logged(tmp_path)[-1] == (saved,)
    assert any(f"[0] SIGTERM: saved at step {saved};" in line for line in lines)


def test_a_sweep_tells_of_a_run_that_fails_and_goes_on(corpus, tmp_path, launch):  # noqa: F811
    at = [CONFIG, f"--run={tmp_path}", f"--config.data.path={corpus}", "--config.steps=4"]
    at += ["--config.optimizer.warmup_steps=1", "--sweep=optimizer.learning_rate=1e38,0.01"]
    status, output = launch(*at)
    assert status == 1
    assert "1 of 2 failed" in output
    assert "is not finite" in output
    summary = read_summary(tmp_path / "optimizer.learning_rate=0.01")
    assert summary["step"] == 4
    assert f"| 0.01 | 4 | {summary['held_out_bits_per_byte']:.4g} |" in (tmp_path / "sweep.md").read_text()
    status, output = launch(*at[:-1], "--sweep=optimizer.learning_rate=0.01")
    assert status == 0
    assert "is finished" in output
    status, output = launch(*at, "--table")
    assert status == 0
    assert output == (tmp_path / "sweep.md").read_text()


def two(corpus, run, *fields: dict) -> list[str]:
    """The outputs of two processes that end with status 1, each with fields of its own; None starts none."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = dict(
        FIELDS,
        distributed__enabled=True,
        distributed__coordinator=f"localhost:{port}",
        distributed__processes=2,
        distributed__timeout=60,
    )
    given = [(i, common | own) for i, own in enumerate(fields) if own is not None]
    started = [start(command(corpus, run, **own, distributed__process=i)) for i, own in given]
    return [finish(process, status=1) for process in started]


def test_processes_that_differ_name_the_field(corpus, tmp_path):
    for output in two(corpus, tmp_path, {"seed": 0}, {"seed": 1}):
        assert "experiments.train: seed: got 0 in process 0 and 1 in process 1; expected the same" in output


def test_processes_with_other_data_say_so(corpus, tmp_path, monkeypatch):
    other = write_corpus(tmp_path / "other")
    (other / "more.py").write_text("# more\n" * 100)
    here, there = tmp_path / "here", tmp_path / "there"  # one path, as on two machines
    for folder, text in ((here, corpus), (there, other)):
        folder.mkdir()
        (folder / "text").symlink_to(text)
        for name in ("tests", "experiments"):
            (folder / name).symlink_to(os.path.abspath(name))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for number, folder in enumerate((here, there)):
        one = local.commands(flags("text", tmp_path / "run", **FIELDS), 2, port)[number]
        monkeypatch.setattr("tests.experiments.runs.ROOT", folder)
        processes.append(start(one))
    for process in processes:
        assert "experiments.train: the corpus in data.path: got " in finish(process, status=1)


def test_an_address_that_does_not_answer_is_named(corpus, tmp_path):
    (output,) = two(corpus, tmp_path, None, {"distributed__timeout": 2})
    assert "distributed.coordinator: got localhost:" in output
    assert "which does not answer within 2 s" in output
    (output,) = two(corpus, tmp_path, {"distributed__timeout": 2}, None)
    assert "which answers, but not all 2 processes came within 2 s" in output


def test_what_submitit_runs_trains(corpus, tmp_path):
    submitit = slurm.import_submitit()
    given = [CONFIG, f"--run={tmp_path / 'run'}", f"--config.data.path={corpus}", "--config.steps=3"]
    training = slurm.Training([*given, "--config.optimizer.warmup_steps=1"])
    executor = submitit.LocalExecutor(folder=tmp_path / "logs")
    executor.submit(training).result()
    assert read_summary(tmp_path / "run")["step"] == 3
    again = training.checkpoint()  # what it queues after a preemption
    assert again.function.arguments == training.arguments
    failing = executor.submit(slurm.Training([*given, "--config.steps=-1"]))
    assert "steps: got -1" in str(failing.exception())
