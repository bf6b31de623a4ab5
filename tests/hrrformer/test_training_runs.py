"""Training runs: their files, resumption that changes nothing, validation, the test at the end, pretraining."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_hrrformer import draw_noise, pack, tiny_image_config, tiny_text_config

from hrrformer import checkpoints
from hrrformer.config import GuardConfig
from hrrformer.learner import Learner
from hrrformer.training import Run, train
from runtime.checkpoint import load, save
from runtime.config import to_dict
from runtime.errors import RunError, UserError
from runtime.preemption import StopRequest

pytestmark = pytest.mark.filterwarnings("ignore:after .* of the steps validation")
TIMING = ("examples_per_sec", "elapsed_sec", "peak_memory_gib")


def state_of(config, name=None):
    folder = Path(config.out) / "checkpoints"
    return load(folder / name if name else max(folder.glob("step-*.pt")), checkpoints.KIND)


def assert_same_state(first, second):
    assert first["step"] == second["step"] and first["phase"] == second["phase"]
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert first["optimizer"].keys() == second["optimizer"].keys()
    for name, state in first["optimizer"].items():
        assert all(torch.equal(value, second["optimizer"][name][key]) for key, value in state.items()), name


def ticks(config):
    lines = [json.loads(line) for line in (Path(config.out) / "stats.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def result_of(config):
    return json.loads((Path(config.out) / "result.json").read_text())


def test_a_run_leaves_its_files_and_learns(tiny_config):
    run, result = train(tiny_config)
    folder = Path(tiny_config.out)
    assert json.loads((folder / "config.json").read_text())["model"]["vocab_size"] == 257
    assert [tick["step"] for tick in ticks(tiny_config)] == [5, 10, 15, 20, 25]
    assert {"loss", "accuracy", "grad_norm", "lr", "epoch", "phase"} <= ticks(tiny_config)[0].keys()
    validated = [tick["step"] for tick in ticks(tiny_config) if "validation_accuracy" in tick]
    assert validated == [10, 20, 25]  # every second tick, and the last
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"best.pt", *(f"step-{step:08}.pt" for step in (15, 20, 25))}
    assert any((folder / "tensorboard").iterdir())
    assert result == result_of(tiny_config) and result["test_examples"] == 40
    assert result["test_accuracy"] > 0.9 > result["test_majority_baseline"]


def test_the_best_validation_chooses_the_weights(tiny_config):
    _, result = train(tiny_config)
    validated = [tick for tick in ticks(tiny_config) if "validation_accuracy" in tick]
    best = max(validated, key=lambda tick: (tick["validation_accuracy"], -tick["validation_loss"]))
    assert result["best_step"] == best["step"]
    tree = state_of(tiny_config, "best.pt")
    assert tree["step"] == best["step"]
    assert tree["validation"] == {
        "step": best["step"],
        "accuracy": best["validation_accuracy"],
        "loss": best["validation_loss"],
    }


def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tiny_config, tmp_path):
    config = replace(tiny_config, accumulation_steps=2, epochs=2)  # the last tick has five steps as all others
    train(config)
    whole, whole_ticks = state_of(config), ticks(config)

    config = replace(config, out=str(tmp_path / "stopped"))
    train(replace(config, max_steps=13))
    torch.rand(1000)  # what happens to the global generator in between does not matter
    train(config)
    assert_same_state(whole, state_of(config))
    assert ticks(config)[-1] == whole_ticks[-1]


def stop_after(monkeypatch, steps):
    """Asks the next run to stop in its step number `steps`, counted from 1."""
    step, enter = Learner.step, StopRequest.__enter__
    found = {"count": 0}

    def counted(self, *tensors):
        found["count"] += 1
        if found["count"] == steps:
            found["request"].requested = True
        return step(self, *tensors)

    def remember(self):
        found["request"] = self
        return enter(self)

    monkeypatch.setattr(StopRequest, "__enter__", remember)
    monkeypatch.setattr(Learner, "step", counted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_text):
    """A run with pretraining, from start to end."""
    config = replace(tiny_text_config(tiny_text, tmp_path_factory.mktemp("whole") / "run"), pretrain_epochs=1)
    train(config)
    return config


@pytest.mark.parametrize("steps", [8, 25, 30, 37])  # in the pretraining, at its end, at the end of a tick, in a tick
def test_a_stop_request_loses_nothing(uninterrupted, tmp_path, monkeypatch, steps):
    config = replace(uninterrupted, out=str(tmp_path / "stopped"))
    stop_after(monkeypatch, steps)
    run, result = train(config)
    assert run.step == steps and result is None and not (run.folder / "result.json").exists()
    monkeypatch.undo()
    train(config)
    assert_same_state(state_of(uninterrupted), state_of(config))
    assert_same_weights(state_of(uninterrupted, "best.pt"), state_of(config, "best.pt"))
    assert ticks(config) == ticks(uninterrupted)
    assert result_of(config) == result_of(uninterrupted)


def assert_same_weights(first, second):
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


def test_a_killed_run_goes_back_to_its_newest_whole_checkpoint(tiny_config):
    train(tiny_config)
    whole, whole_ticks, whole_result = state_of(tiny_config), ticks(tiny_config), result_of(tiny_config)
    newest = max((Path(tiny_config.out) / "checkpoints").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="damaged"):
        train(tiny_config)
    assert_same_state(whole, state_of(tiny_config))
    assert ticks(tiny_config) == whole_ticks and result_of(tiny_config) == whole_result


def test_the_test_split_is_looked_at_once(tiny_config, monkeypatch):
    looked = []
    from hrrformer.evaluation import Evaluator

    call = Evaluator.__call__
    monkeypatch.setattr(
        Evaluator,
        "__call__",
        lambda self, split, *a, **k: looked.append(split.fingerprint) or call(self, split, *a, **k),
    )
    run, first = train(tiny_config)
    assert looked.count(run.data.test.fingerprint) == 1
    looked.clear()
    assert train(tiny_config)[1] == first and not looked  # a finished run again


def test_longer_training_continues_a_finished_run(tiny_config):
    train(tiny_config)
    run, result = train(replace(tiny_config, epochs=2))
    assert run.step == 50 and result["trained_steps"] == 50
    cosine = replace(tiny_config, epochs=3, optimizer=replace(tiny_config.optimizer, schedule="cosine"))
    with pytest.raises(UserError, match="schedule was exponential, now cosine"):
        train(cosine)


def test_a_checkpoint_without_a_run_is_refused_and_named(tiny_config):
    """The best weights, laid where the newest checkpoint would lie."""
    folder = Path(tiny_config.out) / "checkpoints"
    folder.mkdir(parents=True)
    tree = {"config": to_dict(tiny_config), "step": 0, "phase": "train", "weights": {}}
    save(folder / "step-00000000.pt", tree, checkpoints.KIND)
    with pytest.raises(UserError, match=r"step-00000000.pt is no checkpoint of a run: it lacks data, optimizer, prog"):
        train(tiny_config)


def test_another_configuration_is_refused_and_named(tiny_config, tiny_image):
    train(replace(tiny_config, max_steps=5))
    with pytest.raises(UserError, match="model.dim was 16, now 32"):
        train(replace(tiny_config, model=replace(tiny_config.model, dim=32)))
    with pytest.raises(UserError, match="a run of the task text, not of image"):
        train(tiny_image_config(tiny_image, tiny_config.out))


def test_pretraining_carries_the_encoder_to_the_classifier(tiny_config, tmp_path):
    model = replace(tiny_config.model, dropout=0.0)  # which the global step seeds
    config = replace(tiny_config, pretrain_epochs=2, max_steps=5, pretrain_mask_rate=0.3, model=model)
    train(config)
    found = ticks(config)
    assert [tick["step"] for tick in found if tick["phase"] == "pretrain"] == list(range(5, 55, 5))
    assert found[9]["loss"] < found[0]["loss"] and found[-1]["phase"] == "train"
    pretrained = state_of(config, "pretrained.pt")
    assert pretrained["phase"] == "pretrain" and "hidden_embedding" in pretrained["weights"]

    # A run of its own that starts from the pretrained encoder takes the same steps.
    weights = f"{config.out}/checkpoints/pretrained.pt"
    start = replace(config, pretrain_epochs=0, initial_weights=weights, out=str(tmp_path / "other"))
    train(start)
    assert not any("hidden_embedding" in name for name in state_of(start)["weights"])
    assert ticks(start)[0]["loss"] == found[-1]["loss"] and ticks(start)[0]["grad_norm"] == found[-1]["grad_norm"]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16"},
        {"pretrain_epochs": 0.2, "precision": "bfloat16"},
        {"length_buckets": ()},
    ],
)
def test_options_train(tiny_config, changes):
    config = replace(tiny_config, max_steps=5, **changes)
    _, result = train(config)
    assert math.isfinite(result["test_loss"])
    assert {value.dtype for value in state_of(config)["weights"].values()} == {torch.float32}


@pytest.fixture
def spoil(monkeypatch):
    """Call it with a condition: where it holds for a run, at its present step, a weight is NaN."""

    def install(condition):
        train_step = Run.train_step

        def spoiled(self, *batch):
            if condition(self):
                weight = self.classifier.token_embedding.weight
                kept = weight.detach().clone()
                weight.data.fill_(math.nan)
                train_step(self, *batch)
                weight.data.copy_(kept)
            else:
                train_step(self, *batch)

        monkeypatch.setattr(Run, "train_step", spoiled)

    return install


def test_weights_that_are_not_finite_end_the_run_with_a_diagnosis_and_are_never_saved(tiny_config):
    optimizer = replace(tiny_config.optimizer, lr=float("inf"))
    config = replace(tiny_config, optimizer=optimizer, guard=GuardConfig(max_restarts=1))
    expected = r"not finite at step \d+: .*Gone back 1 times.*No checkpoint was written"
    with pytest.warns(UserWarning, match="Back to the start"), pytest.raises(RunError, match=expected):
        train(config)
    assert not list(Path(config.out).glob("checkpoints/*.pt"))


@pytest.mark.parametrize(("bad_step", "pretrain_epochs"), [(0, 0), (3, 0), (1, 0.5), (15, 0.5)])
def test_a_run_goes_back_with_other_noise_and_on(tiny_config, spoil, monkeypatch, tmp_path, bad_step, pretrain_epochs):
    """From before there is a checkpoint and after it, in a pretraining and after it; and resumes as if not stopped."""
    spoil(lambda run: run.step == bad_step and run.restarts == 0)
    log = replace(tiny_config.log, steps_per_tick=2, checkpoint_every_ticks=1)
    config = replace(tiny_config, pretrain_epochs=pretrain_epochs, max_steps=6, log=log)
    with pytest.warns(UserWarning, match=rf"not finite at step {bad_step + 1}: loss is nan.*time 1 of 3"):
        run, result = train(config)
    assert run.restarts == 1 and math.isfinite(result["test_loss"])
    assert [line["step"] for line in ticks(config)] == sorted({line["step"] for line in ticks(config)})
    found = json.loads((Path(config.out) / f"diagnosis-{bad_step + 1:08d}.json").read_text())
    assert found["not_finite"]["loss"] == "nan" and found["spectral_norms"]
    stopped = replace(config, out=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="not finite"):
        stop_after(patch, bad_step // 2 * 2 + 3)
        assert train(stopped)[1] is None
    train(stopped)
    assert_same_state(state_of(config), state_of(stopped))


def test_a_collapsed_run_says_so_once(tiny_config, tmp_path):
    data = pack(tmp_path / "noise.safetensors", "text", 24, ("neg", "pos"), draw_noise)
    still = replace(tiny_config.optimizer, lr=0.0, min_lr=0.0)
    with pytest.warns(UserWarning, match="still the majority baseline") as found:
        train(replace(tiny_config, epochs=2, data=str(data), optimizer=still))
    assert len([warning for warning in found if "majority" in str(warning.message)]) == 1


@pytest.mark.slow
def test_a_compiled_network_takes_the_same_steps(tiny_config, tmp_path):
    found = []
    for compiled in (False, True):
        model = replace(tiny_config.model, dropout=0.0)  # compiled code has its own generator
        config = replace(
            tiny_config,
            compile=compiled,
            max_steps=5,
            model=model,
            length_buckets=(),
            out=str(tmp_path / str(compiled)),
        )
        train(config)
        found.append(ticks(config))
    for eager, compiled in zip(*found, strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-3)
        assert compiled["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-2)
