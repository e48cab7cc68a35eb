"""Stopped at any moment, a run goes on as if it had not been; other checkpoints are refused in words."""

import shutil
import signal
import sys
import time

import pytest

from experiments import train as training
from experiments.trainer.checkpoints import CheckpointError, Checkpoints
from tests.experiments.runs import command, finish, logged, start, tiny_config, write_corpus

STEPS = 400  # some milliseconds each: a run is killed long before it ends
FIELDS = dict(steps=STEPS, checkpoint__every=3)
BITS = ("loss", "grad_norm", "update_norm", "bits_per_byte", "learning_rate")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory):
    """What a run that nothing stopped logged."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(command(corpus, folder, **FIELDS)))
    return logged(folder, *BITS)


def start_and_signal(corpus, folder, which, after: int):
    """Start the run, and send it a signal once `after` lines are in its log."""
    process = start(command(corpus, folder, **FIELDS))
    log = folder / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < after):
        time.sleep(0.002)
    process.send_signal(which)
    return process


def test_sigkill_then_sigterm_then_the_losses_of_a_run_that_never_stopped(corpus, whole_run, tmp_path):
    assert len(whole_run) == STEPS
    killed = start_and_signal(corpus, tmp_path, signal.SIGKILL, after=20)
    finish(killed, status=-signal.SIGKILL)
    last = Checkpoints(tmp_path, read_only=True).latest_step()
    assert last is not None
    assert 0 < last < STEPS

    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 399, "lo')  # a line that the kill tore
    stopped = start_and_signal(corpus, tmp_path, signal.SIGTERM, after=last + 40)
    output = finish(stopped)  # status 0
    saved = Checkpoints(tmp_path, read_only=True).latest_step()
    assert last < saved < STEPS
    assert f"goes on from step {last}," in output
    assert f"saved at step {saved};" in output
    assert logged(tmp_path)[-1] == (saved,)

    finish(start(command(corpus, tmp_path, **FIELDS)))
    assert logged(tmp_path, *BITS) == whole_run  # bit for bit, and every step once


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


# What writes past the limit of any file fails as on a full disk, and it takes no disk of its own to see it.
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = sys.argv[1:]
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_leaves_the_last_checkpoint_whole(corpus, tmp_path):
    fields = dict(model__width=160)
    training.train(tiny_config(corpus, tmp_path, steps=3, **fields))
    before = Checkpoints(tmp_path, read_only=True).about(3)

    arguments = command(corpus, tmp_path, steps=6, **fields)
    output = finish(start([sys.executable, "-c", LIMITED, *arguments[2:]]), status=1)
    assert f"experiments.train: {tmp_path / 'checkpoints'} could not be written: " in output
    assert "the last whole checkpoint is step 3" in output
    assert Checkpoints(tmp_path, read_only=True).latest_step() == 3
    assert Checkpoints(tmp_path, read_only=True).about(3) == before

    training.train(tiny_config(corpus, tmp_path, steps=6, **fields))
    assert [step for (step,) in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]
