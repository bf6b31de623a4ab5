"""The Hrrformer on torch-xla's CPU device: one program a step, the CPU's numbers, and one device's numbers on four."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import program_hrrformer
import pytest
import torch

pytestmark = [
    pytest.mark.xla,
    pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla"),
]
TESTS = Path(__file__).parents[1]


def run_program(out, options, num_devices=1):
    environment = os.environ | {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(num_devices),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, TESTS / "xla" / "program_hrrformer.py", out, json.dumps(options)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return program_hrrformer.main(tmp_path_factory.mktemp("cpu") / "out.pt", device="cpu")


@pytest.fixture(scope="module")
def on_xla(tmp_path_factory):
    return run_program(tmp_path_factory.mktemp("xla") / "out.pt", {})


@pytest.fixture(scope="module")
def on_four_devices(tmp_path_factory):
    return run_program(tmp_path_factory.mktemp("spmd") / "out.pt", {}, num_devices=4)


def assert_one_program_a_step(counters):
    """`counters` after each step: nothing compiles after the third, each executes one program, nothing falls back."""
    for of_phase in counters.values():
        assert of_phase[-1]["compilations"] == of_phase[2]["compilations"]
        assert of_phase[-1]["executions"] - of_phase[2]["executions"] == len(of_phase) - 3
        assert not [name for name in of_phase[-1] if name.startswith("aten::")]


def assert_same_numbers(found, expected):
    for name, tensor in expected["state"]["weights"].items():
        error = (found["state"]["weights"][name] - tensor).abs().max()
        assert error <= 1e-4 * tensor.abs().max(), (name, error)
    for phase, values in expected["values"].items():
        assert found["values"][phase] == pytest.approx(values, rel=1e-4), phase
    for one, other in zip(found["evaluations"], expected["evaluations"], strict=True):
        assert torch.equal(one["confusion"], other["confusion"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_one_program_a_step(on_xla):
    assert_one_program_a_step(on_xla["counters"])


def test_validation_is_one_program_a_batch(on_xla):
    _, first, second = on_xla["counters_of_evaluations"]
    assert second["compilations"] == first["compilations"]
    assert second["executions"] - first["executions"] == 5  # 40 examples by 8
    assert not [name for name in second if name.startswith("aten::")]


def test_steps_give_the_numbers_of_the_cpu(on_xla, on_cpu):
    assert_same_numbers(on_xla, on_cpu)


def test_four_devices_give_the_numbers_of_one(on_four_devices, on_xla):
    assert_same_numbers(on_four_devices, on_xla)
    assert_one_program_a_step(on_four_devices["counters"])


def test_noise_follows_the_seed_and_differs_on_every_device(on_four_devices):
    """And neither a new seed nor the noise itself costs a compilation or leaves the device."""
    (first, before), (other, _), (again, after) = on_four_devices["noise"]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == len(first)
    assert after["compilations"] == before["compilations"]
    assert not [name for name in after if name.startswith("aten::")]


def test_pretraining_is_one_program_a_step(tmp_path):
    options = {"pretrain_epochs": 1, "accumulation_steps": 2}
    found = run_program(tmp_path / "xla.pt", options, num_devices=2)
    assert_one_program_a_step(found["counters"])
    assert_same_numbers(found, program_hrrformer.main(tmp_path / "cpu.pt", device="cpu", **options))
