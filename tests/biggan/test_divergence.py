"""Runs whose numbers stop being finite: nothing bad is kept, the run goes back and on, or ends with a diagnosis."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from biggan import checkpoints
from biggan.config import GuardConfig
from biggan.data import drawn_faces
from biggan.divergence import NETWORKS
from biggan.run_state import RunState
from biggan.training import Run, train
from runtime.checkpoint import load
from runtime.device import Device
from runtime.errors import RunError
from runtime.preemption import StopRequest


@pytest.fixture
def config(tiny_config):
    """Eight steps in ticks of two, with a checkpoint after each tick."""
    return replace(tiny_config, total_kimg=0.032)


@pytest.fixture
def spoil(monkeypatch):
    """Call it with a condition: where it holds for a run and a step, the generator's latents are NaN."""

    def install(condition):
        batch = RunState.batch

        def spoiled(self, step):
            tensors = batch(self, step)
            if condition(self, step):
                tensors[2][-1] = math.nan
            return tensors

        monkeypatch.setattr(RunState, "batch", spoiled)

    return install


def lines(config):
    return [json.loads(line) for line in (Path(config.out) / "stats.jsonl").read_text().splitlines()]


def newest(config):
    return load(max((Path(config.out) / "checkpoints").glob("step-*.pt")), checkpoints.KIND)


def all_finite(tree):
    return all(
        x.isfinite().all() for name in ("generator", "discriminator", "ema_generator") for x in tree[name].values()
    )


def weights(gan):
    return {name: p.detach().clone() for name, p in gan.named_parameters()}


def test_a_bad_update_leaves_networks_and_optimizers_as_they_were(config, tmp_path, spoil):
    spoil(lambda run, step: step == 1)
    run = Run(config, drawn_faces(32, 24), Device(), tmp_path)
    run.train_step(*run.batch(0))
    generator, moments = weights(run.gan.generator), run.gan.state_dict()["generator_optimizer"]
    moments = {name: {key: x.clone() for key, x in state.items()} for name, state in moments.items()}
    run.train_step(*run.batch(1))
    discriminator = weights(run.gan.discriminator)
    run.train_step(*run.batch(2))
    assert all(torch.equal(x, generator[name]) for name, x in weights(run.gan.generator).items())
    assert all(torch.equal(x, discriminator[name]) for name, x in weights(run.gan.discriminator).items())
    for name, state in run.gan.state_dict()["generator_optimizer"].items():
        assert all(torch.equal(x, moments[name][key]) for key, x in state.items())
    found = run.gan.guard.reader()()
    assert found.steps == 1 and "loss_g" in found.values
    assert any(name.startswith("gradient of generator.") for name in found.values)


def test_the_run_goes_back_with_another_stream_and_on(config, spoil):
    spoil(lambda run, step: step == 4 and run.restarts == 0)
    with pytest.warns(UserWarning, match=r"not finite at step 5: loss_g is nan.*spectral norms.*step-00000004.*1 of 3"):
        run = train(config)
    assert run.step == 8 and all_finite(newest(config))
    assert [(line["step"], line["restarts"]) for line in lines(config)] == [(2, 0), (4, 0), (6, 1), (8, 1)]
    found = json.loads((Path(config.out) / "diagnosis-00000005.json").read_text())
    assert (
        found["step"] == 5 and found["not_finite"]["loss_g"] == "nan" and "generator.linear" in found["spectral_norms"]
    )
    run.step = 4
    second = run.batch(4)
    run.restarts, run.seed = 0, config.seed
    first = run.batch(4)
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[2], second[2])  # images and latents


def test_a_run_that_went_back_resumes_as_if_it_had_not_been_stopped(config, spoil, tmp_path):
    spoil(lambda run, step: step == 1 and run.restarts == 0)  # before there is any checkpoint
    with pytest.warns(UserWarning, match="Back to the start"):
        train(config)
    whole = newest(config)
    config = replace(config, out=str(tmp_path / "stopped"))
    with pytest.warns(UserWarning, match="Back to the start"):
        train(replace(config, total_kimg=0.016))
    train(config)
    again = newest(config)
    assert again["progress"]["restarts"] == 1
    for name in NETWORKS:
        assert all(torch.equal(x, again[name][key]) for key, x in whole[name].items())


def test_too_many_times_end_the_run_and_leave_the_checkpoint(config, spoil):
    spoil(lambda run, step: step == 5)
    config = replace(config, guard=GuardConfig(max_restarts=2))
    expected = r"not finite at step 6: .*Gone back 2 times.*step-00000004.pt; the same command resumes"
    with pytest.warns(UserWarning) as warned, pytest.raises(RunError, match=expected):
        train(config)
    assert sum("not finite" in str(w.message) for w in warned) == 2
    assert newest(config)["step"] == 4 and all_finite(newest(config))
    assert [line["step"] for line in lines(config)] == [2, 4]


def test_a_stop_request_after_a_bad_update_saves_nothing_of_it(config, spoil, monkeypatch):
    """In the middle of a tick, whose values nobody has looked at yet."""
    request = StopRequest()

    def bad_and_stopped(run, step):
        request.requested = request.requested or step == 4
        return step == 4

    spoil(bad_and_stopped)
    monkeypatch.setattr("biggan.training.StopRequest", lambda: request)
    with pytest.warns(UserWarning, match="not finite at step 5"):
        run = train(config)
    assert run.step == 4 and newest(config)["step"] == 4 and all_finite(newest(config))


@pytest.mark.parametrize("kimg_per_tick", [0.004, 0.016])
def test_weights_that_are_not_finite_are_never_saved(config, kimg_per_tick):
    """The update itself makes them so, of finite gradients: noticed by the checkpoint, or by the step that follows."""
    config = replace(
        config,
        guard=GuardConfig(max_restarts=1),
        optimizer=replace(config.optimizer, generator_lr=float("inf")),
        log=replace(config.log, kimg_per_tick=kimg_per_tick),
    )
    with pytest.warns(UserWarning), pytest.raises(RunError, match=r"not finite at step \d.*No checkpoint was written"):
        train(config)
    assert not list((Path(config.out) / "checkpoints").iterdir())
