"""One step: accumulation, clipping, the weighing of hidden tokens, and batches as functions of the step."""

from dataclasses import replace

import pytest
import torch
from tiny_hrrformer import tiny_text_config

from hrrformer.learner import Learner
from hrrformer.pretraining import hidden_shares, hide_tokens
from hrrformer.run_setup import fit_to_data, open_data
from hrrformer.training import Run
from runtime.device import Device


@pytest.fixture
def make_run(tiny_text, tmp_path):
    def make(**changes):
        model = changes.pop("model", {})
        config = tiny_text_config(tiny_text, tmp_path)
        config = replace(config, model=replace(config.model, dropout=0.0, **model), **changes)
        data = open_data(config)
        run = Run(fit_to_data(config, data), data, Device(), tmp_path)
        run.enter(run.phases[0])
        return run

    return make


def gradients_of_a_step(run):
    dealt, whole = next(run.phase.batches(0, run.device))
    values = run.learner.step(whole[0], *dealt, *whole[1:])
    return [p.grad.clone() for p in run.learner.objective.parameters() if p.grad is not None], values


@pytest.mark.parametrize("pretrain_epochs", [0, 1])
def test_accumulation_gives_the_gradients_of_the_whole_batch(make_run, pretrain_epochs):
    """Pretraining too: its parts hide different numbers of tokens."""
    whole, whole_values = gradients_of_a_step(make_run(pretrain_epochs=pretrain_epochs))
    parts, values = gradients_of_a_step(make_run(pretrain_epochs=pretrain_epochs, accumulation_steps=4))
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for name in Learner.STEP_VALUES:
        torch.testing.assert_close(values[name], whole_values[name], rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_gradient_and_reports_its_norm_before(make_run):
    run = make_run()
    free, values = gradients_of_a_step(run)
    limit = float(values["grad_norm"]) / 3
    clipped, clipped_values = gradients_of_a_step(
        make_run(optimizer=replace(run.config.optimizer, clip_grad_norm=limit))
    )
    assert clipped_values["grad_norm"] == values["grad_norm"]
    for found, expected in zip(clipped, free, strict=True):
        torch.testing.assert_close(found, expected / 3, rtol=1e-4, atol=1e-8)


def test_the_two_sided_loss_is_taken(make_run):
    values = [
        gradients_of_a_step(make_run(loss=loss, label_smoothing=0.0))[1] for loss in ("cross-entropy", "two-sided")
    ]
    assert float(values[1]["loss"]) == pytest.approx(2 * float(values[0]["loss"]), rel=1e-5)  # of two classes


def test_hidden_tokens():
    lengths = torch.tensor([[60, 100]] * 64)  # of two inputs
    hidden = hide_tokens(lengths, 100, 0.25, torch.Generator().manual_seed(0))
    assert hidden.shape == (64, 2, 100) and not hidden[:, 0, 60:].any()
    assert abs(float(hidden[:, 0, :60].float().mean()) - 0.25) < 0.02 and hidden[:, 1, 60:].any()
    assert hide_tokens(lengths[:, :1], 100, 0.25, torch.Generator()).shape == (64, 100)
    assert float(hidden_shares(hidden, 4).sum()) == pytest.approx(4 * 4 / int(hidden.sum()))
    assert torch.isfinite(hidden_shares(torch.zeros(2, 3, dtype=torch.bool), 1)).all()


def test_batches_depend_on_the_step_alone(make_run):
    run = make_run(pretrain_epochs=1)
    for phase in run.phases:
        batches = list(phase.batches(phase.first, run.device))
        assert len(batches) == phase.num_steps == 25
        again = next(phase.batches(phase.first + 7, run.device))
        for found, expected in zip(again[0] + again[1], batches[7][0] + batches[7][1], strict=True):
            assert torch.equal(found, expected)
