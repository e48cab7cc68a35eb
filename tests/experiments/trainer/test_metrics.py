"""metrics.jsonl survives kills; the bar's stand-in is plain lines; the loss curve is a picture."""

import json

import pytest

from experiments.trainer.metrics import Metrics, keep_lines, plot_loss, read_lines

VALUES = {"loss": 1.5, "bits_per_byte": 2.0, "tokens_per_second": 1000.0}


def log_steps(folder, first, last, **options):
    metrics = Metrics(folder, first_step=first, steps=10, enabled=True, **{"tensorboard": False, **options})
    for step in range(first + 1, last + 1):
        metrics.log(step, VALUES, write=True)
    metrics.close()


def test_lines_past_the_checkpoint_are_dropped_and_written_again(tmp_path):
    log_steps(tmp_path, 0, 7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    log_steps(tmp_path, 5, 10)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 11))
    assert not (tmp_path / "metrics.partial").exists()


def test_keep_lines_changes_nothing_it_keeps(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "loss": 0.1 * i}) + "\n" for i in range(5)]
    file.write_text("".join(lines))
    keep_lines(file, 3)
    assert file.read_text() == "".join(lines[:4])


def test_without_a_terminal_it_prints_plain_lines(tmp_path, capsys):
    log_steps(tmp_path, 0, 10)
    printed = capsys.readouterr()
    assert "step 10/10: loss 1.500, 2.000 bits/byte, 1,000 tokens/s" in printed.out
    assert "\r" not in printed.out + printed.err


def test_tensorboard_gets_every_metric(tmp_path):
    log_steps(tmp_path, 0, 3, tensorboard=True)
    events = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert all(name.encode() in events for name in VALUES)


def test_other_processes_write_nothing(tmp_path):
    metrics = Metrics(tmp_path, first_step=0, steps=2, tensorboard=True, enabled=False)
    metrics.log(1, VALUES, write=True)
    metrics.say("nothing")
    metrics.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_the_loss_curve(tmp_path, steps):
    log_steps(tmp_path, 0, steps)
    picture = plot_loss(tmp_path, {"gzip -9": 1.6})
    assert (picture is None) if steps == 0 else picture.read_bytes().startswith(b"\x89PNG")
