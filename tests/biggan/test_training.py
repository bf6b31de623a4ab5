"""Training: the step, the run directory, and resumption that changes nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from biggan import checkpoints
from biggan.config import EmaConfig, ModelConfig
from biggan.ema import ema_decay
from biggan.gan import Gan
from biggan.training import train
from runtime.checkpoint import save
from runtime.config import to_dict
from runtime.device import Device
from runtime.errors import RunError, UserError
from runtime.preemption import StopRequest

WEIGHTS = ("generator", "discriminator", "ema_generator")


def state_of(config):
    return checkpoints.read(config.out)[1]


def assert_same_state(first, second):
    for name in WEIGHTS:
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name]), name
    for name in ("generator_optimizer", "discriminator_optimizer"):
        assert first[name].keys() == second[name].keys()
        for parameter, state in first[name].items():
            assert all(torch.equal(state[key], second[name][parameter][key]) for key in state), parameter


def ticks(config):
    lines = [json.loads(line) for line in (Path(config.out) / "stats.jsonl").read_text().splitlines()]
    timing = ("sec_per_kimg", "elapsed_sec", "peak_memory_gib")
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def test_a_run_leaves_its_files(tiny_config):
    config = replace(tiny_config, log=replace(tiny_config.log, metric_every_ticks=4, metric_images=16))
    train(config)
    folder = Path(config.out)
    assert json.loads((folder / "config.json").read_text())["model"]["resolution"] == 32
    assert [tick["step"] for tick in ticks(config)] == [2, 4, 6, 8]
    assert {"kimg", "loss_d_real", "loss_g", "grad_norm_g", "lr_d"} <= ticks(config)[0].keys()
    assert ticks(config)[-1]["swd16"] > 0
    assert len(list((folder / "checkpoints").glob("step-*.pt"))) == config.log.keep_checkpoints
    assert (folder / "samples" / "kimg-00000.032.png").exists()
    assert any((folder / "tensorboard").iterdir())


def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tiny_config, tmp_path):
    config = replace(tiny_config, d_steps_per_g_step=2, accumulation_steps=2, total_kimg=0.064)
    train(config)
    whole, whole_ticks = state_of(config), ticks(config)

    config = replace(config, out=str(tmp_path / "stopped"))
    train(replace(config, total_kimg=0.024))  # three steps of eight, the last in the middle of nothing
    torch.rand(1000)  # what happens to the global generator in between does not matter
    train(config)
    assert_same_state(whole, state_of(config))
    assert ticks(config)[-1] == whole_ticks[-1]


def test_a_stop_request_in_the_middle_of_a_tick_loses_nothing(tiny_config, tmp_path, monkeypatch):
    config = replace(tiny_config, log=replace(tiny_config.log, kimg_per_tick=0.016))
    train(config)
    whole, whole_ticks = state_of(config), ticks(config)

    config = replace(config, out=str(tmp_path / "stopped"))
    step = Gan.step

    def step_until_stopped(self, *tensors):
        step_until_stopped.count += 1
        if step_until_stopped.count == 3:
            step_until_stopped.request.requested = True
        return step(self, *tensors)

    step_until_stopped.count = 0
    enter = StopRequest.__enter__

    def remember(self):
        step_until_stopped.request = self
        return enter(self)

    monkeypatch.setattr(StopRequest, "__enter__", remember)
    monkeypatch.setattr(Gan, "step", step_until_stopped)
    assert train(config).step == 3
    monkeypatch.undo()
    train(config)
    assert_same_state(whole, state_of(config))
    assert ticks(config) == whole_ticks


def test_a_killed_run_goes_back_to_its_newest_whole_checkpoint(tiny_config, tmp_path):
    train(tiny_config)
    whole, whole_ticks = state_of(tiny_config), ticks(tiny_config)
    newest = sorted((Path(tiny_config.out) / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="damaged"):
        train(tiny_config)
    assert_same_state(whole, state_of(tiny_config))
    assert ticks(tiny_config) == whole_ticks


def test_a_checkpoint_without_a_run_is_refused_and_named(tiny_config):
    """As tools.convert_biggan writes it, laid into the folder of a run."""
    state = Gan(tiny_config, Device()).state_dict()
    folder = Path(tiny_config.out) / "checkpoints"
    folder.mkdir(parents=True)
    save(folder / "step-00000000.pt", {"config": to_dict(tiny_config), "step": 0, **state}, checkpoints.KIND)
    with pytest.raises(UserError, match=r"step-00000000.pt is no checkpoint of a run: it lacks data, progress, rng."):
        train(tiny_config)


def test_another_configuration_is_refused_and_named(tiny_config):
    train(replace(tiny_config, total_kimg=0.008))
    with pytest.raises(UserError, match=r"model.generator_channels was 4, now 8"):
        train(replace(tiny_config, model=replace(tiny_config.model, generator_channels=8)))
    with pytest.raises(UserError, match="drawn_faces was 24, now 30"):
        train(replace(tiny_config, drawn_faces=30))


def batch(config, device=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s, a = config.d_steps_per_g_step, config.accumulation_steps
    b = config.global_batch_size // a
    images = torch.randint(256, (s, a, b, 3, 32, 32), generator=generator, dtype=torch.uint8)
    z = torch.randn(s + 1, a, b, 8, generator=generator)
    y = torch.randint(config.model.num_classes, (s + 1, a, b), generator=generator)
    return images, y[:s], z, y, torch.tensor(0.1)


def test_accumulation_gives_the_gradients_of_the_whole_batch(tiny_config):
    """In evaluation mode: batch norm sees the parts and spectral norm steps once a call, by definition."""
    gradients = []
    for parts in (1, 2):
        dense = replace(tiny_config.attention, name="dense", options={})  # SMYRF draws other projections for each part
        config = replace(tiny_config, accumulation_steps=parts, attention=dense)
        torch.manual_seed(0)
        gan = Gan(config, Device())
        gan.generator.eval()
        gan.discriminator.eval()
        images, labels, z, y, _ = batch(replace(config, accumulation_steps=1))
        cut = [x.unflatten(2, (parts, -1)).squeeze(1) for x in (images, labels, z, y)]
        torch.manual_seed(1)
        gan.discriminator_step(cut[0][0], cut[1][0], cut[2][0], cut[3][0])
        gradients.append([p.grad.clone() for p in gan.discriminator.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16"},
        {"channels_last": False},
        {"precision": "bfloat16", "checkpoint_activations": "blocks"},
        {"model": ModelConfig(32, 4, 4, 8, num_classes=3, shared_dim=6, hierarchical=True)},
        {"model": ModelConfig(64, 4, 4, 8)},
    ],
)
def test_options_train(tiny_config, changes):
    config = replace(tiny_config, total_kimg=0.008, **changes)
    if config.model.num_classes > 1:
        images, labels, z, y, rate = batch(config)
        gan = Gan(config, Device())
        assert all(
            value.isfinite() for value in gan.step(images, labels, z[..., : gan.generator.dim_z], y, rate).values()
        )
    else:
        train(config)
        assert all(torch.isfinite(v).all() for v in state_of(config)["generator"].values())


def test_float32_weights_under_bfloat16(tiny_config):
    gan = Gan(replace(tiny_config, precision="bfloat16"), Device())
    gan.step(*batch(tiny_config))
    assert {p.dtype for p in gan.generator.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in gan.discriminator.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("what", ["attention", "blocks"])
def test_checkpointed_activations_change_no_weight_and_no_statistic(tiny_config, what, accumulation_steps):
    config = replace(tiny_config, d_steps_per_g_step=2, accumulation_steps=accumulation_steps)
    states = []
    for mode in ("none", what):
        torch.manual_seed(0)
        gan = Gan(replace(config, checkpoint_activations=mode), Device())
        for network in (gan.generator, gan.discriminator):
            for name, parameter in network.named_parameters():
                if name.endswith("gamma"):
                    parameter.data.fill_(0.5)
        for seed in range(2):
            projections = gan.draw_projections(torch.Generator().manual_seed(seed))
            gan.step(*batch(config, seed=seed), *projections)
        states.append(gan.state_dict())
    assert_same_state(*states)


def bytes_kept(network, *inputs):
    """The memory of all that a forward pass keeps for the backward pass."""
    sizes = {}

    def remember(x):
        sizes[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        network(*inputs)
    return sum(sizes.values())


def test_checkpointed_activations_are_not_kept(tiny_config):
    kept = [
        bytes_kept(
            Gan(replace(tiny_config, checkpoint_activations=mode), Device()).discriminator,
            torch.rand(4, 3, 32, 32),
            torch.zeros(4, dtype=torch.int64),
        )
        for mode in ("blocks", "attention", "none")
    ]
    assert kept[0] < kept[1] < kept[2]


def test_orthogonal_penalty_changes_the_generators_step(tiny_config):
    weights = []
    for penalty in (0.0, 1e-2):
        torch.manual_seed(0)
        gan = Gan(replace(tiny_config, optimizer=replace(tiny_config.optimizer, orthogonal_penalty=penalty)), Device())
        with torch.no_grad():
            gan.generator.linear.weight.add_(torch.randn_like(gan.generator.linear.weight))  # not orthogonal any more
        gan.step(*batch(tiny_config))
        weights.append(gan.generator.linear.weight.detach().clone())
    assert not torch.equal(*weights)


def test_ema_copies_then_averages():
    config = EmaConfig(decay=0.9, start_step=3, warmup=False)
    assert [ema_decay(config, step) for step in (1, 2, 3, 4)] == [0, 0, 0.9, 0.9]
    warm = EmaConfig(decay=0.9, start_step=0, warmup=True)
    assert ema_decay(warm, 1) == pytest.approx(2 / 11) and ema_decay(warm, 10**6) == 0.9


def test_divergence_ends_the_run_with_a_diagnosis(tiny_config):
    config = replace(tiny_config, optimizer=replace(tiny_config.optimizer, generator_lr=float("inf")))
    with pytest.warns(UserWarning), pytest.raises(RunError, match="not finite at step 2"):
        train(config)


def test_mechanisms_exchange_without_touching_the_weights(tiny_config):
    smyrf = Gan(tiny_config, Device())
    dense = Gan(replace(tiny_config, attention=replace(tiny_config.attention, name="dense", options={})), Device())
    dense.load_state_dict(smyrf.state_dict())
    smyrf.load_state_dict(dense.state_dict())


@pytest.mark.slow
def test_compiled_networks_take_the_same_step(tiny_config):
    values = []
    # Without updates: Adam's first steps turn rounding into whole steps, and the generator's step would see them.
    still = replace(tiny_config.optimizer, generator_lr=0.0, discriminator_lr=0.0)
    for compiled in (False, True):
        torch.manual_seed(0)
        gan = Gan(replace(tiny_config, optimizer=still, compile=compiled), Device())
        projections = gan.draw_projections(torch.Generator().manual_seed(1))  # compiled code has its own generator
        values.append(gan.step(*batch(tiny_config), *projections))
    assert values[0].keys() == values[1].keys()
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, rtol=1e-3, atol=1e-3)
