"""Which device a name opens, and what it says where there is none."""

import importlib.util

import pytest
import torch

from runtime.device import Device, open_device
from runtime.errors import UserError
from runtime.state import load_optimizer_by_name, optimizer_state_by_name


def test_auto_without_accelerators_is_the_cpu(monkeypatch):
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_device("auto").kind == "cpu"


def test_xla_without_torch_xla_says_how_to_install_it(monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[tpu\]'"):
        open_device("xla")
    assert open_device("auto").kind == "cpu"


def test_unknown_devices_are_refused():
    with pytest.raises(UserError, match="auto, cpu, cuda, xla"):
        open_device("tpu")


def test_a_profile_leaves_a_trace(tmp_path):
    with Device().profile(tmp_path):
        torch.randn(10) @ torch.randn(10)
    (trace,) = tmp_path.glob("*.pt.trace.json")
    assert "aten::" in trace.read_text()


def test_a_step_from_loaded_moments_is_the_same_in_every_memory_format():
    """The fused step goes through memory, whatever the strides of weight, gradient and moments."""
    generator = torch.Generator().manual_seed(0)
    weight, grad, first, second = torch.rand(4, 8, 4, 3, 3, generator=generator)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer = torch.nn.Conv2d(4, 8, 3, bias=False).to(memory_format=memory_format)
        optimizer = Device().adam(layer.parameters(), lr=0.1)
        load_optimizer_by_name(
            layer, optimizer, {"weight": {"step": torch.tensor(3.0), "exp_avg": first, "exp_avg_sq": second}}
        )
        with torch.no_grad():
            layer.weight.copy_(weight)
        (layer.weight * grad).sum().backward()
        optimizer.step()
        results.append((layer.weight, optimizer_state_by_name(layer, optimizer)["weight"]["exp_avg_sq"]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_moments_of_another_shape_are_refused():
    layer = torch.nn.Linear(3, 3, bias=False)
    state = {"weight": {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    with pytest.raises(UserError, match="weight has another shape"):
        load_optimizer_by_name(layer, Device().adam(layer.parameters()), state)
