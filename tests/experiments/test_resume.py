"""Stopped at any moment, a run goes on as if it had not been; other checkpoints are refused in words."""

import contextlib
import os
import resource
import shutil
import signal
import sys
import time

import pytest

from experiments import train as training
from experiments.trainer.checkpoints import CheckpointError, Checkpoints
from experiments.trainer.metrics import Metrics
from tests.experiments.runs import call, command, finish, logged, start, tiny_config, write_corpus
from tests.seeds import generator

BITS = ("loss", "grad_norm", "update_norm", "bits_per_byte", "learning_rate")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


# SIGKILL comes in the middle of a step, and perhaps of a save, which another thread writes.
KILLED = """
import os, signal, sys
from experiments import train
from experiments.trainer.flags import run
from experiments.trainer.metrics import Metrics

log, last = Metrics.log, int(sys.argv.pop(1))

def log_and_die(self, step, *args, **kwargs):
    log(self, step, *args, **kwargs)
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)

Metrics.log = log_and_die
run(train.main)
"""


def test_sigkill_then_sigterm_then_the_losses_of_a_run_that_never_stopped(
    corpus, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    fields = dict(steps=40, checkpoint__every=3)
    never_stopped = tmp_path_factory.mktemp("whole")
    training.train(tiny_config(corpus, never_stopped, **fields))
    at = int(generator(0).integers(8, 24))
    _, _, *arguments = command(corpus, tmp_path, **fields)
    killed = start([sys.executable, "-c", KILLED, str(at), *arguments[1:]])
    finish(killed, status=-signal.SIGKILL)
    last = Checkpoints(tmp_path, read_only=True).latest_step()
    assert 0 < last <= at

    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 39, "lo')  # a line that the kill tore
    log = Metrics.log

    def log_and_stop(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if step == last + 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", log_and_stop)
        assert training.train(tiny_config(corpus, tmp_path, **fields)) is None
    saved = Checkpoints(tmp_path, read_only=True).latest_step()
    assert saved - (last + 10) in (1, 2)  # metrics are read a step late
    output = capsys.readouterr().out
    assert f"goes on from step {last}," in output
    assert f"saved at step {saved};" in output
    assert logged(tmp_path)[-1] == (saved,)

    training.train(tiny_config(corpus, tmp_path, **fields))
    assert len(logged(tmp_path)) == 40
    assert logged(tmp_path, *BITS) == logged(never_stopped, *BITS)  # bit for bit, and every step once


@pytest.mark.full
def test_signals_from_outside_at_any_moment(corpus, tmp_path, tmp_path_factory):
    """The same with processes as a person has them; 400 steps of some milliseconds outlast the signals."""
    fields = dict(steps=400, checkpoint__every=3)
    never_stopped = tmp_path_factory.mktemp("whole")
    training.train(tiny_config(corpus, never_stopped, **fields))
    log, after = tmp_path / "metrics.jsonl", 20
    for which, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
        process = start(command(corpus, tmp_path, **fields))
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < after):
            time.sleep(0.002)
        process.send_signal(which)
        finish(process, status=status)
        last = Checkpoints(tmp_path, read_only=True).latest_step()
        assert 0 < last < 400
        after = last + 40
    assert logged(tmp_path)[-1] == (last,)
    finish(start(command(corpus, tmp_path, **fields)))
    assert logged(tmp_path, *BITS) == logged(never_stopped, *BITS)


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """These tests look at losses and checkpoints only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "report", lambda *args, **kwargs: None)
        yield


@pytest.fixture(scope="module")
def short_run(corpus, tmp_path_factory):
    """A run's folder with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("short")
    training.train(tiny_config(corpus, folder, steps=8, checkpoint__every=4))
    return folder


@pytest.fixture
def copy(short_run, tmp_path):
    """A copy of `short_run` to spoil."""
    return shutil.copytree(short_run, tmp_path / "copy")


def test_another_config_is_refused_with_the_difference_named(corpus, copy):
    config = tiny_config(
        corpus, copy, steps=8, batch_size=4, optimizer__learning_rate=0.1, checkpoint__every=4
    )
    with pytest.raises(ValueError, match="another config") as error:
        training.train(config)
    assert "batch_size: 2 there, 4 here" in str(error.value)
    assert "optimizer.learning_rate: 0.02 there, 0.1 here" in str(error.value)
    assert "checkpoint" not in str(error.value).split(":", 1)[1].replace("checkpoints", "")


def test_another_corpus_is_refused(corpus, copy):
    file = next(corpus.iterdir())
    text = file.read_text()
    file.write_text(text + "# more\n")
    try:
        with pytest.raises(CheckpointError, match=r"corpus was .* and is"):
            training.train(tiny_config(corpus, copy, steps=12, checkpoint__every=4))
    finally:
        file.write_text(text)


def test_more_steps_are_fine(corpus, copy):
    training.train(tiny_config(corpus, copy, steps=12, checkpoint__every=4, log_every=2))
    assert [step for (step,) in logged(copy)] == [*range(1, 9), 10, 12]


def spoil(how, file):
    data = bytearray(file.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    if how == "flipped":
        data[len(data) // 2] ^= 1
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(data)


@pytest.mark.parametrize("item", ["params", "training", "about", "data"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_spoiled_checkpoint_is_named_with_the_one_before(corpus, copy, how, item):
    folder = copy / "checkpoints" / "8"
    files = [p for p in (folder / item).rglob("*") if p.is_file() and p.name != "commit_success.txt"]
    spoil(how, max(files, key=lambda p: p.stat().st_size))
    config = tiny_config(corpus, copy, steps=12, checkpoint__every=4)
    with pytest.raises(CheckpointError) as error:
        training.train(config)
    assert str(folder) in str(error.value)
    assert "step 4 instead" in str(error.value)
    assert (copy / "checkpoints" / "4").is_dir()


def test_what_the_error_says_helps(corpus, copy):
    shutil.rmtree(copy / "checkpoints" / "8")
    training.train(tiny_config(corpus, copy, steps=10, checkpoint__every=4))
    assert [step for (step,) in logged(copy)] == list(range(1, 11))


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Writes past this size of any file fail as on a full disk, and take no disk to do so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint_whole(corpus, tmp_path):
    fields = dict(model__width=160)
    training.train(tiny_config(corpus, tmp_path, steps=3, **fields))
    before = Checkpoints(tmp_path, read_only=True).about(3)

    with files_of_at_most(100_000):
        _, _, *arguments = command(corpus, tmp_path, steps=6, **fields)
        status, output = call(training.main, *arguments[1:])
    assert status == 1
    assert f"experiments.train: {tmp_path / 'checkpoints'} could not be written: " in output
    assert "the last whole checkpoint is step 3" in output
    assert Checkpoints(tmp_path, read_only=True).latest_step() == 3
    assert Checkpoints(tmp_path, read_only=True).about(3) == before

    training.train(tiny_config(corpus, tmp_path, steps=6, **fields))
    assert [step for (step,) in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]
