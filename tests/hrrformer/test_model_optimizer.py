"""Optimizers and the schedule of the learning rate."""

import math

import pytest
import torch
from small_models import build, sequences, small
from tolerance import assert_close

from hrrformer.config import OptimizerConfig
from hrrformer.losses import two_sided_cross_entropy
from hrrformer.optimizer import build_optimizer, learning_rate, set_learning_rate
from runtime.device import open_device

STEPS = 100


def rates(batch_size=10, **fields):
    config = OptimizerConfig(**fields)
    return [learning_rate(config, step, STEPS, batch_size) for step in range(STEPS)]


def test_exponential():
    found = rates(lr=1e-3, decay_rate=0.5, decay_examples=70, min_lr=1e-4)
    assert found[0] == found[1] == 1e-3  # the first two steps have the same rate
    assert math.isclose(found[8], 5e-4) and math.isclose(found[15], 2.5e-4)
    assert found[-1] == 1e-4
    assert found == rates(lr=1e-3, decay_rate=0.5, decay_examples=140, min_lr=1e-4, batch_size=20)


def test_cosine():
    found = rates(schedule="cosine", lr=1.0, min_lr=0.2)
    assert found[0] == 1.0 and math.isclose(found[50], 0.6)
    assert 0.2 < found[-1] < 0.201
    assert found == sorted(found, reverse=True)
    assert learning_rate(OptimizerConfig(schedule="cosine"), STEPS + 5, STEPS, 10) == OptimizerConfig().min_lr


@pytest.mark.parametrize("schedule", ["exponential", "cosine"])
def test_warmup_is_linear_and_ends_at_the_schedules_start(schedule):
    found = rates(schedule=schedule, lr=1.0, min_lr=0.0, warmup_steps=9)
    assert_close(torch.tensor(found[:10]), torch.arange(1, 11) / 10)
    assert found[9] == max(found)
    if schedule == "exponential":
        assert found[9:] == rates(schedule=schedule, lr=1.0, min_lr=0.0)[:-9]


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_optimizers_are_torchs(name):
    """Three steps with another rate each, against torch's own classes."""
    generator = torch.Generator().manual_seed(0)
    start, inputs = torch.randn(4, 3, generator=generator), torch.randn(3, 5, 4, generator=generator)
    config = OptimizerConfig(name=name, beta1=0.8, beta2=0.99, epsilon=1e-3, weight_decay=0.1)
    ours, theirs = torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(4, 3, bias=False)
    ours.weight.data, theirs.weight.data = start.T.clone(), start.T.clone()
    optimizer = build_optimizer(ours, config, open_device("cpu"))
    torchs = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    reference = torchs(theirs.parameters(), betas=(0.8, 0.99), eps=1e-3, weight_decay=0.1)
    for x, rate in zip(inputs, (0.1, 0.05, 0.02), strict=True):
        set_learning_rate(optimizer, torch.tensor([rate]))
        reference.param_groups[0]["lr"] = rate
        for network, stepper in ((ours, optimizer), (theirs, reference)):
            stepper.zero_grad()
            network(x).square().mean().backward()
            stepper.step()
        assert_close(ours.weight, theirs.weight)


@pytest.mark.cuda
@pytest.mark.parametrize("attention", ["hrr", "dense"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_on_cuda_do_not_wait(attention, precision):
    """Forward, backward and the optimizer with a new rate, compiled, while any wait for the device is an error."""
    device, config = open_device("cuda"), small("text", num_layers=1)
    model = build(config, attention)
    device.put_network(model, torch.contiguous_format)
    optimizer = build_optimizer(model, OptimizerConfig(), device)
    network = torch.compile(model, fullgraph=True, dynamic=False)
    tokens, labels = device.put(sequences(config)), device.put(torch.tensor([0, 1, 1]))
    losses = []
    for step, rate in enumerate((1e-3, 5e-3, 1e-2, 1e-2, 1e-2)):
        rate = device.put(torch.tensor([rate]))
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # after the compilation
        try:
            optimizer.zero_grad()
            with device.autocast(precision):
                logits = network(tokens)
            loss = two_sided_cross_entropy(logits, labels)
            loss.backward()
            set_learning_rate(optimizer, rate)
            optimizer.step()
            losses.append(loss.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
    assert losses[-1] < losses[0]
