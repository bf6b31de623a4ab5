"""Every attention mechanism on torch-xla's CPU device: nothing falls back to the host; the numbers are the CPU's."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import program_attention
import pytest
import torch

from attention import available_attention, get_mechanism
from runtime.device import open_device
from tests.tolerance import assert_close

pytestmark = [
    pytest.mark.xla,
    pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla"),
]
ROOT = Path(__file__).parents[2]


def run_program(mode, out):
    environment = os.environ | {
        "PJRT_DEVICE": "CPU",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, ROOT / "tests" / "xla" / "program_attention.py", mode, out]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return run_program("trace", tmp_path_factory.mktemp("xla") / "out.pt")


@pytest.fixture(scope="module")
def on_xla(tmp_path_factory):
    return run_program("run", tmp_path_factory.mktemp("xla") / "out.pt")


@pytest.mark.parametrize("name", list(available_attention()))
def test_nothing_falls_back_to_the_host(name, traced):
    assert "error" not in traced[name], traced[name]["error"]
    assert traced[name]["fallbacks"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", list(available_attention()))
def test_numbers_are_those_of_the_cpu(name, on_xla):
    """Where contents choose the keys, each device draws its own hashes, and only finiteness is asked for."""
    assert "error" not in on_xla[name], on_xla[name]["error"]
    assert on_xla[name]["fallbacks"] == []
    expected = program_attention.outputs(name, open_device("cpu"))
    for found, truth in zip(on_xla[name]["outputs"], expected, strict=True):
        assert found.isfinite().all()
        if get_mechanism(name).kind != "content":
            assert_close(found, truth, 1e-4)
