"""The labelled tasks are what they say, and every classification config ends in seconds as a smoke run."""

import ast
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import classify as runner
from experiments.classify import classify
from experiments.data import examples
from tests.experiments.runs import ROOT

CONFIGS = ("induction_heads", "lmuformer_vowels", "parity", "selective_copying", "vmamba_digits")


def get_config_of(name):
    return importlib.import_module(f"experiments.configs.classify.{name}").get_config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_what_it_is_for_and_its_models_build(name):
    text = ast.get_docstring(ast.parse((ROOT / f"experiments/configs/classify/{name}.py").read_text()))
    for word in (
        "Reproduces:",
        "Should reach:",
        "Time:",
        f"--config=experiments/configs/classify/{name}.py:smoke",
    ):
        assert word in text
    config, smoke = get_config_of(name)(), get_config_of(name)("smoke")
    assert set(config.models) >= set(smoke.models)
    task = getattr(examples, smoke.task)(**smoke.task_args)
    inputs = jnp.asarray(task.train.inputs[:2])
    for model in smoke.models.values():
        module = runner.build(model, task.classes)
        shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
        scores = jax.eval_shape(lambda v, m=module: runner.logits_of(m, v, inputs), shapes)
        assert scores.shape == (*task.train.labels[:2].shape, task.classes)


def test_one_model_of_a_smoke_variant_trains(tmp_path):
    check_smoke_run("parity", tmp_path, "gated linear attention")


def test_baselines_of_images():
    digits = examples.digits()
    train, held_out = (examples.Examples(*(x[:200] for x in part)) for part in digits[:2])
    found = runner.baselines(examples.Task(train, held_out, 10))
    assert found.keys() == {"logistic regression", "nearest neighbour"}
    assert all(result["accuracy"] > 0.7 for result in found.values())


@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
def test_a_smoke_variant_runs(name, tmp_path):
    check_smoke_run(name, tmp_path)


def check_smoke_run(name, tmp_path, only=None):
    config = get_config_of(name)("smoke")
    if only:
        config.models = ConfigDict({only: config.models[only]})
    found = classify(config, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert (tmp_path / "loss.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    models = list(config.models)
    assert len(lines) == 4 * len(models)
    assert all(0 <= found["results"][name]["accuracy"] <= 1 for name in models)
    assert len(found["results"]) > len(models)  # a baseline beside them


def test_a_killed_run_goes_on_with_the_models_it_lacks(tmp_path, monkeypatch):
    config = get_config_of("selective_copying")("smoke")
    first, second = config.models
    trained = []

    def train(config, model, task, log):
        trained.append(model)
        for step in range(1, 5):
            if trained == [config.models[first], config.models[second]] and step == 3:
                raise KeyboardInterrupt
            log(step, 1.0)
        return {"accuracy": 0.1 * len(trained)}

    monkeypatch.setattr(runner, "train", train)
    with pytest.raises(KeyboardInterrupt):
        classify(config, tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())["results"]
    assert kept == {first: {"accuracy": 0.1}}
    found = classify(config, tmp_path)
    assert [model.to_dict() for model in trained] == [
        config.models[name].to_dict() for name in (first, second, second)
    ]
    assert found["results"] == kept | {second: {"accuracy": 0.1 * 3}, "chance": {"accuracy": 0.125}}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["model"], line["step"]) for line in lines] == [
        (name, step) for name in (first, second) for step in range(1, 5)
    ]
    assert classify(config, tmp_path) == found
    assert len(trained) == 3
    config.batch_size += 1
    with pytest.raises(ValueError, match="another config: batch_size differ"):
        classify(config, tmp_path)


def test_selective_copying_asks_for_the_tokens_in_their_order():
    task = examples.selective_copying(train=20, held_out=5, length=17, copied=4, symbols=6, seed=1)
    for inputs, labels, weights in zip(*task.train, strict=True):
        assert list(inputs[:17][inputs[:17] > 0]) == list(labels[17:])
        assert (inputs[17:] == 1).all()
        assert weights.tolist() == [0] * 17 + [1] * 4
        assert min(labels[17:]) >= 2
    assert len({tuple(np.flatnonzero(row[:17])) for row in task.train.inputs}) > 10  # at random places
    assert task.classes == 8


def test_induction_heads_ask_for_what_followed_the_special_token():
    task = examples.induction_heads(train=50, held_out=5, length=12, symbols=6, seed=1, longer=(20,))
    assert list(task.lengths) == ["20"]
    for part, length in ((task.train, 12), (task.held_out, 12), (task.lengths["20"], 20)):
        for inputs, labels, weights in zip(*part, strict=True):
            first, last = np.flatnonzero(inputs == 0)
            assert last == length - 1
            assert labels[-1] == inputs[first + 1]
            assert weights.tolist() == [0] * (length - 1) + [1]


def test_parity_asks_for_the_parity_of_the_bits_so_far():
    task = examples.parity(train=20, held_out=5, length=9, seed=1, longer=(15,))
    for part, length, counted in ((task.train, 9, 9), (task.held_out, 9, 9), (task.lengths["15"], 15, 6)):
        for inputs, labels, weights in zip(*part, strict=True):
            assert weights.tolist() == [0] * (length - counted) + [1] * counted
            assert labels.tolist() == [sum(inputs[: i + 1].tolist()) % 2 for i in range(length)]
    assert task.train.inputs.mean() == pytest.approx(0.5, abs=0.15)


def test_the_data_sets():
    digits = examples.digits()
    assert digits.train.inputs.shape[1:] == (8, 8, 1)
    assert len(digits.train.inputs) + len(digits.held_out.inputs) == 1797
    vowels = examples.vowels()
    assert vowels.train.inputs.shape == (270, 29, 12)
    assert vowels.held_out.inputs.shape == (370, 29, 12)
    assert (vowels.train.weights.sum(axis=1) == 1).all()
    ends = vowels.train.weights.argmax(axis=1)
    assert ends.min() == 6  # the shortest has 7 frames
    np.testing.assert_allclose(vowels.train.inputs[0, 0, :2], [1.860936, -0.207383])
    assert np.bincount(vowels.train.labels.max(axis=1)).tolist() == [30] * 9
