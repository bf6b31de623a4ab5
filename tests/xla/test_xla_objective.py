"""Augmentation, penalties and pairs on torch-xla: one program a step, and the numbers of the CPU and of one device."""

import importlib.util

import gan_program
import pytest
import torch
from on_xla import assert_one_program, run_program
from test_xla import assert_same_numbers

from runtime.config import to_dict

pytestmark = [
    pytest.mark.xla,
    pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla"),
]
POLICY = ("color", "translation", "cutout", "flip", "rotation", "scale")
PENALTIES = {"r1": 1, "r2": 1, "consistency_real": 1, "consistency_fake": 1, "lecam": 0.1}
# Without attention in the discriminator: see tests/biggan/test_processes.py.
ATTENTION = {**to_dict(gan_program.demo().attention), "discriminator_resolutions": ()}
ADAPTIVE = {
    "attention": ATTENTION | {"generator_resolutions": ()},
    "float64": True,
    "steps": 5,
    "record": 5,
    "loss": {"lecam": 0.1},
    "augment": {"policy": POLICY, "target": 0.1, "kimg": 0.05, "probability": 0.8},
}
EVERYTHING = ADAPTIVE | {"attention": ATTENTION, "loss": {"name": "relativistic", **PENALTIES}}


def on_cpu(folder, run):
    gan_program.main(folder / "cpu.pt", "cpu", {"run": dict(run)})
    return torch.load(folder / "cpu.pt")["run"]


def on_xla(folder, run, num_devices=1):
    return run_program(folder / f"{num_devices}.pt", {"runs": {"run": run}}, num_devices=num_devices)["run"]


def assert_same_run(found, expected):
    """With a probability that has been moving, for which nothing was compiled."""
    assert_one_program(found["counters"])
    assert_same_numbers(found, expected)
    assert 0 < expected["state"]["objective"]["augmentation"]["probability"] < 0.81
    for name, values in expected["state"]["objective"].items():
        for key, value in values.items():
            torch.testing.assert_close(found["state"]["objective"][name][key], value, rtol=1e-8, atol=0)


def test_nothing_falls_back_to_the_host(tmp_path):
    """With attention in both networks; the step is traced, not compiled."""
    changes = {"loss": EVERYTHING["loss"], "augment": EVERYTHING["augment"]}
    found = run_program(tmp_path / "out.pt", {"fallbacks_of": ["demo"], "changes": changes})
    assert found["fallbacks"] == {"demo": []}


@pytest.mark.slow
def test_adaptive_augmentation_is_that_of_the_cpu(tmp_path):
    assert_same_run(on_xla(tmp_path, ADAPTIVE), on_cpu(tmp_path, ADAPTIVE))


@pytest.mark.slow
def test_everything_is_that_of_the_cpu_and_on_four_devices_that_of_one(tmp_path):
    one = on_xla(tmp_path, EVERYTHING)
    assert_same_run(one, on_cpu(tmp_path, EVERYTHING))
    assert_same_run(on_xla(tmp_path, EVERYTHING, num_devices=4), one)


@pytest.mark.slow
def test_one_program_a_step_in_bfloat16_with_attention_differentiated_twice(tmp_path):
    run = {key: value for key, value in EVERYTHING.items() if key not in ("attention", "float64")}
    assert_one_program(on_xla(tmp_path, run | {"precision": "bfloat16", "accumulation_steps": 2})["counters"])
