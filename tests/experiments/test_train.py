"""A whole small run: what it leaves, and that parts, devices and modes don't change its losses."""

import json
import math

import jax
import numpy as np
import pytest

from experiments import train as training
from experiments.trainer.checkpoints import Checkpoints
from experiments.trainer.runs import load_run
from tests.devices import run_on_eight_devices
from tests.errors import bound
from tests.experiments.runs import logged, tiny_config, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """(run's folder, summary) of one run that has everything on."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(
        corpus,
        folder,
        steps=30,
        batch_size=8,
        ema_decay=0.5,
        tensorboard=True,
        checkpoint__every=10,
        sample__tokens=20,
    )
    return folder, training.train(config)


def assert_same_losses(one, other):
    # The same sums in another order, and each step starts from where rounding led the last: a few bounds.
    np.testing.assert_allclose(one, other, rtol=10 * bound("float32"))


def test_it_learns(run):
    losses = [loss for _, loss in logged(run[0], "loss")]
    assert len(losses) == 30
    # Knowing nothing costs ln 256; half-knowing which bytes are common costs a good nat less.
    assert np.mean(losses[-5:]) < math.log(256) - 0.5


def test_it_leaves_what_it_promises(run):
    folder, summary = run
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["held_out_bytes"] == 1024
    for name in ("held_out_bits_per_byte", "gzip_bits_per_byte", "order3_bits_per_byte"):
        assert 0 < summary[name] < 9
    assert {"compile_seconds", "training_seconds"} < summary.keys()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sample.txt").read_text().startswith("def ")
    assert any((folder / "tensorboard").iterdir())
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [20, 30]  # keep = 2


def test_sizes_are_the_models(run):
    folder, summary = run
    _, _, variables, _, _ = load_run(folder)
    numbers = sum(x.size for x in jax.tree.leaves(variables))
    assert summary["parameters"] == numbers
    assert summary["parameter_bytes"] == 4 * numbers
    # Adam keeps two moments, and it and the schedule count steps.
    assert summary["optimizer_state_bytes"] == 2 * 4 * numbers + 2 * 4


def test_load_run_gives_the_moving_average(run):
    folder, _ = run
    config, _, variables, tokenizer, step = load_run(folder)
    assert (step, tokenizer, config.steps) == (30, None, 30)
    raw = Checkpoints(folder, read_only=True).restore_params(30, variables["params"], ema=False)
    differ = [
        not np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (raw, variables["params"])), strict=True)
    ]
    assert sum(differ) >= len(differ) - 1  # the bounds of a single layer have no gradient


def test_the_finished_run_only_reports(run, corpus):
    folder, summary = run
    config, *_ = load_run(folder)
    config.run_dir = str(folder)
    again = training.train(config)
    assert again["held_out_bits_per_byte"] == summary["held_out_bits_per_byte"]
    assert "training_seconds" not in again


@pytest.fixture
def no_report(monkeypatch):
    """For tests that look at losses only."""
    monkeypatch.setattr(training, "report", lambda *args, **kwargs: None)


def test_parts_of_a_batch_add_up(corpus, tmp_path, no_report):
    for parts in (1, 4):
        training.train(tiny_config(corpus, tmp_path / str(parts), steps=5, batch_size=4, accumulate=parts))
    whole, parts = (logged(tmp_path / name, "loss", "grad_norm") for name in ("1", "4"))
    assert_same_losses(whole, parts)


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch):
    make_loader = training.make_loader

    def poisoned(*args, **kwargs):
        loader = make_loader(*args, **kwargs)
        take = type(loader).__next__
        count = iter(range(1, 100))

        def next_batch(self):
            batch = take(self)
            if next(count) == 7:
                batch["weights"] = batch["weights"] * np.float32("nan")
            return batch

        monkeypatch.setattr(type(loader), "__next__", next_batch)
        return loader

    monkeypatch.setattr(training, "make_loader", poisoned)
    config = tiny_config(corpus, tmp_path, checkpoint__every=2)
    with pytest.raises(
        FloatingPointError, match=r"step 7 is not finite \(.*loss nan.*checkpoint of step 6 is kept"
    ):
        training.train(config)
    assert Checkpoints(tmp_path, read_only=True).latest_step() == 6
    assert [step for (step,) in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_two_devices_by_jit_and_by_pmap_have_the_losses_of_one(corpus, tmp_path):
    run_on_eight_devices("tests.experiments.two_devices", str(corpus), str(tmp_path))
    one = logged(tmp_path / "one", "loss", "grad_norm")
    assert len(one) == 5
    for name in ("jit", "pmap", "pmap parts"):
        assert_same_losses(one, logged(tmp_path / name, "loss", "grad_norm")[:5])
    assert_same_losses(logged(tmp_path / "jit", "loss"), logged(tmp_path / "pmap", "loss"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(batch_size=3, accumulate=2), "batch_size: got 3; expected a multiple of 2"),
        (dict(parallel="threads"), "parallel: got 'threads'"),
        (dict(mesh__data=64), "mesh.data: got 64"),
        (dict(optimizer__name="no_such"), "optimizer.name: got 'no_such'"),
        (dict(optimizer__warmup_steps=12), "optimizer.warmup_steps: got 12; expected 0 to 11"),
        (dict(model__pattern=("gru", "mlp")), "model.pattern: .*expected names of model.blocks"),
        (dict(model__vocab_size=7), "model.vocab_size: got 7; expected 256"),
        (dict(data__path="/nowhere"), "/nowhere"),
    ],
)
def test_a_field_that_cannot_be_right_is_named(corpus, tmp_path, changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        training.train(tiny_config(corpus, tmp_path, **changes))
