"""The networks on torch-xla's CPU device: no fallback to the host, one program for all steps, the CPU's numbers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_xla_program import TASKS, train
from tolerance import assert_close

from runtime.device import open_device

pytestmark = [
    pytest.mark.xla,
    pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla"),
]
ROOT = Path(__file__).parents[2]


def run_on_xla(out):
    environment = os.environ | {
        "PJRT_DEVICE": "CPU",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    program = ROOT / "tests" / "hrrformer" / "model_xla_program.py"
    done = subprocess.run([sys.executable, program, out], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


def test_steps_on_xla(tmp_path):
    on_xla = run_on_xla(tmp_path / "out.pt")
    for task in TASKS:
        found, expected = on_xla[task], train(task, open_device("cpu"))
        counters = found["counters"]
        assert not [name for name in counters[-1] if name.startswith("aten::")]
        assert counters[-1]["compilations"] == counters[1]["compilations"]
        assert counters[-1]["executions"] - counters[1]["executions"] == len(counters) - 2
        assert_close(found["losses"], expected["losses"])
        for name, tensor in expected["weights"].items():
            assert_close(found["weights"][name], tensor)
