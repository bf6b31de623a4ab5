"""Runs with augmentation and penalties: resumed, continued from older ones, guarded, compiled; and what is refused."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gan_program import build
from test_objective import gan_of, uniforms_for
from test_training import assert_same_state, batch, state_of, ticks

from biggan import checkpoints
from biggan.commands.train import parse
from biggan.config import AugmentConfig, LossConfig
from biggan.objective_options import check
from biggan.training import train
from runtime.checkpoint import save
from runtime.device import Device
from runtime.errors import UserError

POLICY = ("color", "translation", "cutout", "flip", "rotation", "scale")
EVERYTHING = {
    "loss": LossConfig("relativistic", r1=1.0, r2=0.5, consistency_real=2.0, consistency_fake=1.0, lecam=0.1),
    "augment": AugmentConfig(POLICY, 0.8, 0.1, kimg=0.05),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"precision": "bfloat16", "checkpoint_activations": "blocks"}, marks=pytest.mark.slow),
        pytest.param({"channels_last": False, "checkpoint_activations": "attention"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_with_everything_on_resumes_bit_for_bit(tiny_config, tmp_path, changes):
    config = replace(tiny_config, d_steps_per_g_step=2, accumulation_steps=2, total_kimg=0.048, **EVERYTHING, **changes)
    train(config)
    whole, whole_ticks = state_of(config), ticks(config)
    assert 0 < whole_ticks[-1]["augment_probability"] < 0.81
    assert {"r1", "r2", "lecam", "consistency_real", "consistency_fake", "sign_real"} < whole_ticks[-1].keys()

    config = replace(config, out=str(tmp_path / "stopped"))
    train(replace(config, total_kimg=0.024))
    train(config)
    found = state_of(config)
    assert_same_state(whole, found)
    assert found["objective"] == whole["objective"] and set(found["objective"]) == {"lecam", "augmentation"}
    assert ticks(config)[-1] == whole_ticks[-1]


def test_what_is_remembered_does_not_outlive_a_bad_step(tiny_config):
    gan = gan_of(tiny_config, **EVERYTHING)
    images, labels, z, y, rate = batch(tiny_config)
    config = gan.config
    gan.step(images, labels, z, y, rate, uniforms=uniforms_for(gan, config))
    before = copy.deepcopy(gan.state_dict()["objective"])
    gan.step(images, labels, z * torch.nan, y, rate, uniforms=uniforms_for(gan, config))
    assert gan.state_dict()["objective"] == before


def test_numbers_are_the_steps_own_and_leave_the_other_noise_alone(tiny_config, tmp_path):
    plain, augmented = (
        build(replace(tiny_config, **changes), Device(), tmp_path)
        for changes in ({}, {"augment": AugmentConfig(POLICY, 0.5)})
    )
    first, again, other = augmented.batch(3), augmented.batch(3), augmented.batch(4)
    assert first[4].shape == (2, 4, 2, augmented.gan.objective.numbers)
    assert torch.equal(first[4], again[4]) and not torch.equal(first[4], other[4])
    assert first[4].unique().numel() > 0.99 * first[4].numel()
    for x, y in zip(plain.batch(3), first[:4] + first[5:], strict=True):
        assert torch.equal(x, y)


def test_a_run_from_before_these_options_goes_on(tiny_config):
    train(replace(tiny_config, total_kimg=0.016))
    for path in (Path(tiny_config.out) / "checkpoints").glob("*.pt"):
        tree = checkpoints.read(path)[1]
        for section in ("loss", "augment"):
            del tree["config"][section]
        del tree["objective"]
        save(path, tree, checkpoints.KIND)
    assert train(tiny_config).step == 8
    with pytest.raises(UserError, match="loss.r1 was 0.0, now 1.0"):
        train(replace(tiny_config, loss=LossConfig(r1=1.0)))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--loss wasserstein", "hinge, nonsaturating, relativistic"),
        ("--loss.r1 -1", "--loss.r1 must not be below 0"),
        ("--loss.r1 1 --compile", "no --compile"),
        ("--loss.r2 1 --attention.backend flash", "use einsum"),
        ("--loss.lecam-start-step 10", "--loss.lecam"),
        ("--loss.lecam 0.1 --loss.lecam-decay 1", "lecam-decay"),
        ("--augment.policy colour", "color, translation, cutout, flip, rotation, scale"),
        ("--augment.target 0.6", "--augment.policy"),
        ("--augment.policy flip --augment.target 1", "0.6 is usual"),
        ("--augment.policy flip --augment.probability 0", "above 0"),
        ("--augment.policy color,rotation", "which way is up"),
    ],
)
def test_what_makes_no_sense_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        check(parse(flags.split())[0])


@pytest.mark.parametrize("attention", ["dense", "linear", "performer", "linformer"])
def test_other_mechanisms_take_gradient_penalties(tiny_config, attention):
    options = {"max_length": 256} if attention == "linformer" else {}
    changed = replace(tiny_config.attention, name=attention, options=options)
    gan = gan_of(tiny_config, attention=changed, loss=LossConfig(r1=1.0))
    for stage in gan.discriminator.blocks:
        if stage.attention is not None:
            torch.nn.init.constant_(stage.attention.gamma, 0.5)
    values = gan.step(*batch(tiny_config))
    assert values["r1"] > 0 and values["grad_norm_d"].isfinite()


@pytest.mark.slow
def test_compiled_networks_take_the_same_step(tiny_config):
    """With everything that torch.compile can do."""
    loss = LossConfig("relativistic", consistency_real=1.0, consistency_fake=1.0, lecam=0.1)
    still = replace(tiny_config.optimizer, generator_lr=0.0, discriminator_lr=0.0)  # as in test_training.py
    config = replace(tiny_config, optimizer=still, loss=loss, augment=AugmentConfig(POLICY, 0.5))
    values = []
    for compiled in (False, True):
        gan = gan_of(config, compile=compiled)
        projections = gan.draw_projections(torch.Generator().manual_seed(1))
        values.append(gan.step(*batch(tiny_config), *projections, uniforms=uniforms_for(gan, config)))
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, rtol=1e-3, atol=1e-3)
