"""Training by several processes: the numbers of one, files of the first alone, and an end together."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import gan_program
import pytest
import torch
from launch import ROOT, environment, run_processes, start_processes
from PIL import Image

from biggan.data import ImageDataset, open_images
from runtime.config import to_dict
from runtime.device import Device
from runtime.distributed import Processes

RUNS = {
    "exact": {"float64": True, "steps": 5, "record": 5, "samples": 6, "d_steps_per_g_step": 2, "accumulation_steps": 2},
    "float32": {"checkpoint_activations": "blocks", "record": 3},
    "regularised": {
        "float64": True,
        "accumulation_steps": 2,
        "loss": {"name": "relativistic", "r1": 1, "r2": 1, "consistency_real": 1, "consistency_fake": 1, "lecam": 0.1},
        "augment": {"policy": ["color", "translation", "cutout", "scale"], "target": 0.1, "kimg": 0.05},
        "d_steps_per_g_step": 2,
        # Without attention in the discriminator: cutout and shifts leave patches of equal tokens, whose order in a hash
        # round, and whose largest in a pooling, only rounding decides.
        "attention": {**to_dict(gan_program.demo().attention), "discriminator_resolutions": ()},
    },
}
TRAIN = (
    *("-m", "biggan", "train", "--preset", "demo", "--drawn-faces", "24", "--global-batch-size", "4"),
    *("--model.dim-z", "8", "--model.generator-channels", "4", "--model.discriminator-channels", "4"),
    *("--log.grid", "2", "--log.kimg-per-tick", "0.016", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out.pt"
    gan_program.main(out, "cpu", json.loads(json.dumps(RUNS)), evaluate=True)
    return torch.load(out)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(The program asserts that both processes hold the same bits.)"""
    out = tmp_path_factory.mktemp("two") / "out.pt"
    options = {"device": "cpu", "runs": RUNS, "evaluate": True}
    run_processes(2, [ROOT / "tests" / "gan_program.py", out, json.dumps(options)])
    return torch.load(out)


def test_two_processes_train_as_one(one, two):
    """After five steps, in float64 (see tests/xla/test_xla.py), with the preset's own optimizer."""
    for network in ("generator", "discriminator", "ema_generator"):
        for name, tensor in one["exact"]["state"][network].items():
            error = (two["exact"]["state"][network][name] - tensor).abs().max() / tensor.abs().max()
            assert error <= 1e-8, (network, name, error)
    assert two["exact"]["values"] == pytest.approx(one["exact"]["values"], rel=1e-8)
    assert two["float32"]["values"] == pytest.approx(one["float32"]["values"], rel=1e-3)


def test_two_processes_augment_and_remember_as_one(one, two):
    """The probability of augmentation and the means of logits come from the whole batch."""
    one, two = one["regularised"], two["regularised"]
    assert 0.5 < one["state"]["objective"]["augmentation"]["probability"] <= 1
    for network in ("generator", "discriminator"):
        for name, tensor in one["state"][network].items():
            error = (two["state"][network][name] - tensor).abs().max() / tensor.abs().max()
            assert error <= 1e-8, (network, name, error)
    assert two["values"] == pytest.approx(one["values"], rel=1e-8)
    for name, values in one["state"]["objective"].items():
        for key, value in values.items():
            torch.testing.assert_close(two["state"]["objective"][name][key], value, rtol=1e-8, atol=0)


def test_two_processes_draw_and_measure_the_images_of_one(one, two):
    assert (two["exact"]["images"].int() - one["exact"]["images"].int()).abs().max() <= 1
    for found, expected in zip(two["evaluation"], one["evaluation"], strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


class OneOfTwo(Processes):
    count = 2

    def __init__(self, index):
        self.index = index


def test_each_process_reads_and_puts_its_rows_only(tmp_path, monkeypatch):
    config = replace(gan_program.demo(), d_steps_per_g_step=2, accumulation_steps=2)
    taken, take = [], ImageDataset.take
    monkeypatch.setattr(ImageDataset, "take", lambda self, indices: taken.append(len(indices)) or take(self, indices))
    whole, *halves = (
        gan_program.build(config, Device(processes), tmp_path).batch(5)
        for processes in (Processes(), OneOfTwo(0), OneOfTwo(1))
    )
    assert taken == [16, 8, 8]  # two discriminator steps of eight
    for i, expected in enumerate(whole):
        parts = [half[i] for half in halves]
        assert torch.equal(torch.cat(parts, dim=1) if i < 4 else parts[1], expected)  # the rest is for all


def test_processes_of_a_machine_share_one_file_of_images(tmp_path, monkeypatch):
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    datasets = []
    for count in (1, 2):
        for name, value in (("RANK", 0), ("WORLD_SIZE", count), ("LOCAL_WORLD_SIZE", count)):
            monkeypatch.setenv(name, str(value))
        datasets.append(open_images(tmp_path, 8, cache_dir=tmp_path / "cache", progress=False))
        assert len(list((tmp_path / "cache").glob("*"))) == count - 1
    assert torch.equal(datasets[0].images, datasets[1].images)


def wait_for_ticks(folder, count, processes):
    log = folder / "stats.jsonl"
    for _ in range(1200):
        if log.exists() and len(log.read_text().splitlines()) >= count:
            return
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.1)
    raise AssertionError("no tick in two minutes")


def test_all_stop_when_one_is_asked_and_end_when_one_dies(tmp_path):
    command = [*TRAIN, "--out", tmp_path, "--total-kimg", "100"]
    processes = start_processes(2, command)
    wait_for_ticks(tmp_path, 1, processes)
    processes[1].send_signal(signal.SIGTERM)
    out = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "stopped at" in out[0] and "stopped at" not in out[1]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    steps = int(re.fullmatch(r"step-(\d+)\.pt", checkpoint.name)[1])

    processes = start_processes(2, command)
    wait_for_ticks(tmp_path, steps // 4 + 1, processes)
    processes[1].kill()
    died = time.monotonic()
    out, error = processes[0].communicate(timeout=60)
    assert time.monotonic() - died < 60
    assert f"resuming from {checkpoint}" in out
    assert processes[0].returncode == 1 and error.splitlines()[-1].startswith("error: process 0 of 2 lost the others")
    assert "Traceback" not in error
    assert checkpoint.exists()


@pytest.mark.slow
def test_torchrun_starts_a_run_that_one_process_continues(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*TRAIN, "--out", tmp_path, "--total-kimg"]
    subprocess.run([*launch, *command, "0.016"], cwd=ROOT, env=environment(), check=True, timeout=300)
    subprocess.run([sys.executable, *command, "0.032"], cwd=ROOT, env=environment(), check=True, timeout=300)
    assert [json.loads(line)["step"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()] == [4, 8]
    command = ("-m", "--", "biggan", "sample", "--checkpoint", tmp_path, "--num", "7", "--out", tmp_path / "x.npz")
    subprocess.run([*launch, *command], cwd=ROOT, env=environment(), check=True, timeout=300)
    assert (tmp_path / "x.npz").exists()
