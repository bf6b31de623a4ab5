"""Which device a name opens, and what it says where there is none."""

import importlib.util

import pytest
import torch

from runtime.device import Device, open_device
from runtime.errors import UserError


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
