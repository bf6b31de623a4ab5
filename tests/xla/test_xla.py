"""torch-xla on its CPU device: one program a step, the CPU's numbers, and one device's numbers on four.

The programs run in processes of their own (see program.py). What they are held to on a TPU is the same, except time.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.xla,
    pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla"),
]
ROOT = Path(__file__).parents[2]
NETWORKS = ("generator", "discriminator", "ema_generator")


def run(command, num_devices=1, flags=""):
    """Runs `python *command` with torch-xla's CPU device and returns its standard error."""
    environment = os.environ | {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(num_devices),
        "XLA_FLAGS": f"--xla_backend_optimization_level=0 {flags}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def run_program(name, out, options, **where):
    run([ROOT / "tests" / "xla" / "program.py", name, out, json.dumps(options)], **where)
    return torch.load(out)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return run_program("train", tmp_path_factory.mktemp("cpu") / "out.pt", {"device": "cpu", "samples": 12})


@pytest.fixture(scope="module")
def on_xla(tmp_path_factory):
    return run_program("train", tmp_path_factory.mktemp("xla") / "out.pt", {"steps": 20, "samples": 12})


@pytest.fixture(scope="module")
def on_four_devices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spmd")
    dump = f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text"
    return run_program("train", folder / "out.pt", {}, num_devices=4, flags=dump) | {"folder": folder / "dump"}


def assert_one_program_a_step(counters):
    """`counters` after each step: nothing compiles after the third, each executes one program, nothing falls back."""
    assert counters[-1]["compilations"] == counters[2]["compilations"]
    assert counters[-1]["executions"] - counters[2]["executions"] == len(counters) - 3
    assert not [name for name in counters[-1] if name.startswith("aten::")]


def members(order, num_clusters=2):
    """The tokens of each cluster; their order inside it, which rounding may change, has no effect."""
    return order.unflatten(-1, (num_clusters, -1)).sort(dim=-1).values


def assert_same_numbers(found, expected):
    for network in NETWORKS:
        for name, tensor in expected["state"][network].items():
            error = (found["state"][network][name] - tensor).abs().max() / tensor.abs().max()
            assert error <= 1e-4, (network, name, error)
    for name, value in expected["values"].items():
        assert found["values"][name] == pytest.approx(value, rel=1e-4), name


def assert_same_clusters(found, expected):
    for found_order, order in zip(found["clusters"], expected["clusters"], strict=True):
        assert torch.equal(members(found_order), members(order))


def test_one_program_a_step(on_xla):
    assert_one_program_a_step(on_xla["counters"][:-1])


def test_sampling_is_one_program_a_batch(on_xla):
    before, after = on_xla["counters"][-2:]
    assert after["executions"] - before["executions"] == 2  # 12 images by 8
    assert after["compilations"] - before["compilations"] == 1
    assert not [name for name in after if name.startswith("aten::")]


def test_three_steps_give_the_numbers_of_the_cpu(on_xla, on_cpu):
    assert_same_numbers(on_xla, on_cpu)
    assert_same_clusters(on_xla, on_cpu)


def test_four_devices_give_the_numbers_of_one(on_four_devices, on_xla):
    assert_same_numbers(on_four_devices, on_xla)
    assert_same_clusters(on_four_devices, on_xla)
    assert_one_program_a_step(on_four_devices["counters"][:-1])


def test_devices_exchange_nothing_but_sums(on_four_devices):
    """No activation is gathered: every collective of the partitioned program is a sum, none with a batch in it."""
    programs = [path.read_text() for path in on_four_devices["folder"].glob("*.step.*after_optimizations.txt")]
    program = max(programs, key=len)
    assert "sharding={devices=[1,4" in program  # the batch is dealt
    collectives = re.findall(r"= \S+ (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", program)
    assert set(collectives) == {"all-reduce"}


def test_features_of_the_fid_network(tmp_path):
    found = run_program("features", tmp_path / "xla.pt", {})
    expected = run_program("features", tmp_path / "cpu.pt", {"device": "cpu"})
    scale = expected["features"].abs().max()
    torch.testing.assert_close(found["features"], expected["features"], rtol=0, atol=1e-4 * scale)
    first, _, last = found["counters"]
    assert last["compilations"] == first["compilations"] and last["executions"] == first["executions"] + 2
    assert not [name for name in last if name.startswith("aten::")]


def test_bfloat16_keeps_float32_weights_and_one_program(tmp_path):
    found = run_program("train", tmp_path / "out.pt", {"precision": "bfloat16", "steps": 5})
    assert {tensor.dtype for network in NETWORKS for tensor in found["state"][network].values()} == {torch.float32}
    assert all(math.isfinite(value) for value in found["values"].values())
    assert_one_program_a_step(found["counters"][:-1])


TRAIN = (
    *("-m", "biggan", "train", "--preset", "demo", "--drawn-faces", 24, "--global-batch-size", 4, "--model.dim-z", 8),
    *("--model.generator-channels", 4, "--model.discriminator-channels", 4, "--log.grid", 2, "--debug.xla-metrics"),
    *("--log.kimg-per-tick", 0.016),
)


def test_a_run_moves_from_the_cpu_to_xla_and_back(tmp_path):
    """Three times four steps: each continues the checkpoint of the one before it, and reads it without torch_xla."""
    for device, kimg in (("cpu", 0.016), ("xla", 0.032), ("cpu", 0.048)):
        command = [*TRAIN, "--out", tmp_path, "--device", device, "--total-kimg", kimg]
        said = run(command)
        if device == "xla":
            assert re.search(r"^compilations \d+  executions \d+$", said, re.MULTILINE)  # and no fallback after them
    lines = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    state = torch.load(tmp_path / "checkpoints" / "step-00000012.pt", weights_only=True)
    steps = {float(entry["step"]) for entry in state["generator_optimizer"].values()}
    assert steps == {12.0}


def test_checkpointed_activations_on_xla(on_xla, tmp_path):
    found = run_program("train", tmp_path / "out.pt", {"checkpoint_activations": "blocks"})
    assert_same_numbers(found, on_xla)


@pytest.mark.slow
def test_one_program_a_step_of_celebahq128_smyrf(tmp_path):
    found = run_program("train", tmp_path / "out.pt", {"preset": "celebahq128", "steps": 20})
    assert_one_program_a_step(found["counters"][:-1])
