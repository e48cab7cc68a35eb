"""A whole small run: what it leaves, and that parts, devices and modes don't change its losses."""

import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train as training
from experiments.configs.defaults import block
from experiments.trainer.checkpoints import CheckpointError, Checkpoints
from experiments.trainer.lock import locked
from experiments.trainer.metrics import Metrics
from experiments.trainer.runs import load_run
from experiments.trainer.state import params_to_use
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
        checkpoint__every=0,
        evaluation__every=10,
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


@pytest.mark.full
def test_it_learns_in_few_bits(corpus, tmp_path):
    config = tiny_config(corpus, tmp_path, steps=30, model__low_bit="nvfp4", sample__tokens=0)
    assert training.train(config)["held_out_bits_per_byte"] < 8 - 0.7
    _, module, variables, _, _ = load_run(tmp_path)
    tokens = jnp.ones((1, 5), jnp.int32)
    low, exact = (m.apply(variables, tokens)[0] for m in (module, module.module))
    assert 0 < float(jnp.abs(low - exact).max()) < 1


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


def test_it_is_evaluated_while_it_trains(run):
    folder, summary = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bits = {line["step"]: line.get("held_out_bits_per_byte") for line in lines}
    assert [step for step, found in bits.items() if found is not None] == [10, 20, 30]
    np.testing.assert_allclose(bits[30], summary["held_out_bits_per_byte"], rtol=1e-6)
    assert summary["best_step"] == 30
    assert summary["best_held_out_bits_per_byte"] == bits[30] < bits[10]


def test_the_best_checkpoint_is_kept(corpus, tmp_path, monkeypatch, no_report):
    found = iter([3.0, 1.0, float("nan"), 2.0])
    monkeypatch.setattr(training, "bits_per_byte", lambda *args, **_: next(found))
    fields = dict(checkpoint__keep=1, evaluation__every=3, log_every=4)
    training.train(tiny_config(corpus, tmp_path, **fields))
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [6, 12]
    assert load_run(tmp_path, "best")[4] == 6
    assert load_run(tmp_path)[4] == 12
    assert logged(tmp_path)[:3] == [(3,), (4,), (6,)]
    with pytest.raises(CheckpointError, match="step: got 999; expected one of 6, 12, which"):
        load_run(tmp_path, 999)
    # A run that goes on knows what the best was.
    monkeypatch.setattr(training, "bits_per_byte", lambda *args, **_: 1.5)
    training.train(tiny_config(corpus, tmp_path, **fields | {"steps": 15}))
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [6, 15]


def test_zero_turns_off(corpus, tmp_path):
    """No evaluation, no sample, no lines and no checkpoint but the last."""
    off = dict(data__held_out=0.0, sample__tokens=0, log_every=0, checkpoint__every=0, evaluation__every=4)
    summary = training.train(tiny_config(corpus, tmp_path, steps=8, **off))
    assert summary["step"] == 8
    assert "held_out_bits_per_byte" not in summary
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints", "lock", "metrics.jsonl", "summary.json"}
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["8"]
    with pytest.raises(CheckpointError, match=r"step: got 'best'; expected evaluation\.every"):
        load_run(tmp_path, "best")


def test_two_do_not_train_in_one_folder(corpus, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match=r"run: got .*another process trains"):
        training.train(tiny_config(corpus, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


def test_sigterm_is_the_programs_own_again_when_the_steps_are_done(corpus, tmp_path, monkeypatch):
    """So that it ends a long report; one that comes with the last step leaves the report to the next call."""
    before, seen = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(
        training, "report", lambda *args, **kwargs: seen.append(signal.getsignal(signal.SIGTERM)) or {}
    )
    config = tiny_config(corpus, tmp_path, steps=3)
    log = Metrics.log

    def log_and_stop(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", log_and_stop)
        assert training.train(config) is None
    assert not seen
    assert signal.getsignal(signal.SIGTERM) is before
    assert training.train(config) == {}
    assert seen == [before]


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
    raw = Checkpoints(folder, read_only=True).restore_params(30, variables["params"], trained=True)
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


@pytest.mark.full  # trainer/test_state.py has it by hand, and two devices have it below
def test_parts_of_a_batch_add_up(corpus, tmp_path, no_report):
    for parts in (1, 4):
        training.train(tiny_config(corpus, tmp_path / str(parts), steps=5, batch_size=4, accumulate=parts))
    whole, parts = (logged(tmp_path / name, "loss", "grad_norm") for name in ("1", "4"))
    assert_same_losses(whole, parts)


@pytest.mark.full  # trainer/test_state.py and tests/memory have each field by itself
def test_memory_changes_no_loss(corpus, tmp_path, no_report):
    """A run that goes on with less memory has the losses of one that had it from the start, or never."""
    fields = {"remat": "dots_without_batch", "offload": True, "loss_tiles": 3, "mlp_tiles": 5}
    memory = {f"memory__{name}": value for name, value in fields.items()}
    how = {
        "batch_size": 4,
        "accumulate": 2,
        "model__blocks__gru__channel": "GLU",
        "optimizer__warmup_steps": 1,
    }
    training.train(tiny_config(corpus, tmp_path / "never", steps=4, **how))
    training.train(tiny_config(corpus, tmp_path / "always", steps=4, **how, **memory))
    for steps, less in ((2, {}), (4, memory)):
        training.train(tiny_config(corpus, tmp_path / "later", steps=steps, **how, **less))
    never, always, later = (
        logged(tmp_path / name, "loss", "grad_norm") for name in ("never", "always", "later")
    )
    assert_same_losses(always, never)
    assert_same_losses(later[:2], never[:2])  # the schedule of two steps is not that of four
    assert len(later) == 4


def poison(monkeypatch, bad):
    """Make the weights of these batches NaN."""
    make_loader = training.make_loader

    def poisoned(*args, **kwargs):
        loader = make_loader(*args, **kwargs)
        take = type(loader).__next__
        count = iter(range(1, 100))

        def next_batch(self):
            batch = take(self)
            if next(count) in bad:
                batch["weights"] = batch["weights"] * np.float32("nan")
            return batch

        monkeypatch.setattr(type(loader), "__next__", next_batch)
        return loader

    monkeypatch.setattr(training, "make_loader", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch):
    poison(monkeypatch, {7})
    config = tiny_config(corpus, tmp_path, checkpoint__every=2)
    with pytest.raises(
        FloatingPointError, match=r"step 7 is not finite \(.*loss nan.*checkpoint of step 6 is kept"
    ):
        training.train(config)
    assert Checkpoints(tmp_path, read_only=True).latest_step() == 6
    assert [step for (step,) in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_steps_that_are_not_finite_are_skipped_and_counted(corpus, tmp_path, monkeypatch, no_report, capsys):
    config = tiny_config(corpus, tmp_path, checkpoint__every=3, skip_nonfinite=2, ema_decay=0.5)
    with monkeypatch.context() as patch:
        poison(patch, {2, 4, 7, 8, 9})
        with pytest.raises(FloatingPointError, match=r"step 9 is not finite .*checkpoint of step 6 is kept"):
            training.train(config)
    assert logged(tmp_path, "skipped_steps") == [*enumerate((0, 1, 1, 2, 2, 2, 3, 4), 1)]
    assert "step 4 is not finite (" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 5, 6]
    # A skipped step is none for the schedule, which warms up over two.
    rates = [line["learning_rate"] for line in lines]
    assert rates[1] == rates[0] < rates[2]
    variables = load_run(tmp_path)[2]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))
    # It goes on with its count; how many may be skipped is another matter each time.
    config.skip_nonfinite = 1
    training.train(config)
    assert logged(tmp_path, "skipped_steps")[-1] == (12, 2)


def test_a_schedule_free_run_in_bfloat16_keeps_its_average(corpus, tmp_path, monkeypatch):
    """Rounded at random, so that it learns; the checkpoint has both forms of the params, and goes on."""
    reported = []
    monkeypatch.setattr(
        training, "report", lambda config, module, state, *args, **kwargs: reported.append(state)
    )
    fields = dict(
        optimizer__name="schedule_free_adamw",
        optimizer__rounding="stochastic",
        model__param_dtype="bfloat16",
        checkpoint__every=3,
    )
    training.train(tiny_config(corpus, tmp_path, steps=4, **fields))
    used = load_run(tmp_path)[2]["params"]
    trained = Checkpoints(tmp_path, read_only=True).restore_params(4, used, trained=True)
    jax.tree.map(np.testing.assert_array_equal, used, params_to_use(reported[0]))
    jax.tree.map(np.testing.assert_array_equal, trained, reported[0].params)
    assert not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (used, trained)), strict=True))
    assert {x.dtype.name for x in jax.tree.leaves((used, trained))} == {"bfloat16"}
    training.train(tiny_config(corpus, tmp_path, steps=16, **fields))
    losses = [loss for _, loss in logged(tmp_path, "loss")]
    assert len(losses) == 16
    assert np.mean(losses[-3:]) < losses[0] - 0.2


def test_two_devices_by_jit_and_by_pmap_have_the_losses_of_one(corpus, tmp_path):
    run_on_eight_devices("tests.experiments.two_devices", str(corpus), str(tmp_path))
    one = logged(tmp_path / "one", "loss", "grad_norm")
    assert len(one) == 5
    for name in ("jit", "pmap"):
        assert_same_losses(one, logged(tmp_path / name, "loss", "grad_norm")[:5])
    assert_same_losses(logged(tmp_path / "jit", "loss"), logged(tmp_path / "pmap", "loss"))


@pytest.mark.full
def test_a_run_goes_on_over_other_devices(corpus, tmp_path):
    """Params and moments shared by eight devices, then by four, then cut by columns: the losses of one."""
    run_on_eight_devices("tests.experiments.two_devices", str(corpus), str(tmp_path), "moves")
    moved, stayed = (logged(tmp_path / name, "loss", "grad_norm") for name in ("moves", "stays"))
    assert len(stayed) == 9
    assert_same_losses(stayed, moved)


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
        (dict(data__path="/no/heldout"), "^data.path: got '/no/heldout', which is not there"),
        (dict(mesh__fsdp=64), "mesh.data: got -1, mesh.fsdp: got 64; expected sizes that divide . devices"),
        (dict(evaluation__batch_size=0), "evaluation.batch_size: got 0"),
        (dict(sample__temperature=-1.0), "sample.temperature: got -1.0"),
        (dict(checkpoint__keep=0), "checkpoint.keep: got 0; expected an integer of at least 1"),
        (dict(model__blocks__gru__mixer="NoSuch"), "model.blocks.gru.mixer: got 'NoSuch'"),
        (dict(ema_decay=0.5, optimizer__name="schedule_free_sgd"), "ema_decay: got 0.5; expected 0 for"),
        (dict(model__low_bit="fp3"), "model.low_bit: recipe: got 'fp3'"),
        (dict(model__low_bit="fp8_delayed"), "model.low_bit: got 'fp8_delayed'; expected a recipe without"),
    ],
)
def test_a_field_that_cannot_be_right_is_named(corpus, tmp_path, changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        training.train(tiny_config(corpus, tmp_path, **changes))


@pytest.mark.full
def test_a_mixture_of_experts_trains_and_goes_on(corpus, tmp_path):
    """Its losses and loads are logged, and the router's state is saved, read, evaluated and sampled with."""
    moe = {"experts": 3, "k": 1, "expand": 1, "router": "sigmoid_top_k", "router_args": {"rate": 2.0**-7}}
    config = tiny_config(corpus, tmp_path, steps=3, checkpoint__every=3)
    config.model.blocks.gru = block(mixer="MLGRU", channel="MoE", channel_args=moe)
    assert training.train(config)["held_out_bits_per_byte"] < 8.5
    for _, entropy, dropped, auxiliary in logged(tmp_path, "load_entropy", "dropped_share", "auxiliary_loss"):
        assert 0 < entropy <= 1
        assert dropped == 0
        assert 0 < auxiliary < 1e-3
    _, _, before, _, _ = load_run(tmp_path)
    config.steps = 4
    training.train(config)
    _, _, after, _, _ = load_run(tmp_path)
    (old,), (new,) = (jax.tree.leaves(x["router_state"]) for x in (before, after))
    assert set(abs(2**7 * old).reshape(-1).tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert set(abs(2**7 * (new - old)).reshape(-1).tolist()) == {1.0}
