"""Whole runs on torch-xla's CPU device: every preset's step, checkpoints that change devices, the hosts of a slice."""

import importlib.util
import json
import re
import sys

import pytest
import torch
from launch import ROOT, run_processes
from on_xla import ABOVE_NOISE, assert_one_program, distance, run_on_xla, run_program

from biggan.checkpoints import read
from biggan.commands import train
from biggan.presets import PRESETS
from runtime.device import Device

pytestmark = [
    pytest.mark.xla,
    pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla"),
]
TRAIN = (
    *("--preset", "demo", "--drawn-faces", "24", "--global-batch-size", "4", "--model.dim-z", "8"),
    *("--model.generator-channels", "4", "--model.discriminator-channels", "4", "--log.grid", "2"),
    *("--log.kimg-per-tick", "0.016", "--optimizer.epsilon", str(ABOVE_NOISE)),
)
LEGS = (("cpu", 4), ("xla", 20), ("cpu", 24))  # devices, and the step that each goes to


def test_a_run_moves_from_the_cpu_to_xla_and_back(tmp_path, monkeypatch):
    """Each leg continues the checkpoint of the one before it; the CPU's read and write without torch_xla."""
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    for device, steps in LEGS:
        command = [*TRAIN, "--out", str(tmp_path / "moving"), "--device", device, "--total-kimg", str(steps * 0.004)]
        if device == "cpu":
            train.main(command)
        else:
            said = run_on_xla(["-m", "biggan", "train", *command, "--debug.xla-metrics", "--debug.profile"])
    assert re.search(r"^compilations \d+  executions \d+$", said, re.MULTILINE) and "aten::" not in said
    assert list((tmp_path / "moving" / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb"))

    train.main([*TRAIN, "--out", str(tmp_path / "staying"), "--device", "cpu", "--total-kimg", "0.096"])
    moved, stayed = (read(tmp_path / name)[1] for name in ("moving", "staying"))
    assert distance(moved, stayed) <= 4e-3  # other numbers of threads move them by 1e-3, four steps by 3e-2
    assert {float(entry["step"]) for entry in moved["generator_optimizer"].values()} == {24.0}
    lines = [json.loads(line) for line in (tmp_path / "moving" / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24]

    grid = tmp_path / "grid.png"
    command = ["-m", "biggan", "sample", "--checkpoint", tmp_path / "moving", "--device", "xla", "--num", "3"]
    run_on_xla([*command, "--batch-size", "2", "--standing-statistics", "3", "--out", grid], num_devices=2)
    assert grid.exists()


class Asked(Exception):
    """For a folder of compiled programs."""


def test_programs_are_kept_in_the_run_directory_or_where_it_is_said(tmp_path, monkeypatch):
    def use_cache(device, folder):
        raise Asked(folder)

    monkeypatch.setattr(Device, "use_cache", use_cache)
    command = [*TRAIN, "--out", str(tmp_path / "run"), "--device", "cpu", "--total-kimg", "0.004"]
    for flags, folder in (((), tmp_path / "run" / "compiled"), (("--compilation-cache", "elsewhere"), "elsewhere")):
        with pytest.raises(Asked) as asked:
            train.main([*command, *flags])
        assert asked.value.args == (folder,)
    train.main([*command, "--compilation-cache", "none"])


@pytest.fixture(scope="module")
def fallbacks(tmp_path_factory):
    return run_program(tmp_path_factory.mktemp("traced") / "out.pt", {"fallbacks_of": list(PRESETS)})["fallbacks"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_traces_to_a_program_without_fallbacks(fallbacks, preset):
    assert fallbacks[preset] == []


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "demo"])
def test_one_program_a_step_of_every_preset(tmp_path, preset):
    runs = {"run": {"narrowed": preset, "steps": 20 if preset == "celebahq128-smyrf" else 5}}
    assert_one_program(run_program(tmp_path / "out.pt", {"runs": runs})["run"]["counters"])


def test_recomputation_saves_memory_and_changes_no_gradient(tmp_path):
    """Of six blocks with three pairs of activations, 0.5 MiB each, at least half of what is kept: 9 MiB."""
    dump = f"--xla_dump_to={tmp_path / 'dump'} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=step.*"
    run_on_xla([ROOT / "tests" / "xla" / "memory_program.py", tmp_path / "out.pt"], flags=dump)
    for kept, computed in zip(*torch.load(tmp_path / "out.pt"), strict=True):
        assert (kept - computed).abs().max() <= 1e-4 * kept.abs().max()
    reports = sorted((tmp_path / "dump").glob("*memory-usage-report.txt"))
    kept, computed = (int(re.search(r"Total bytes used: (\d+)", path.read_text())[1]) for path in reports)
    assert computed < kept / 2


def test_two_hosts_agree_and_the_first_writes(tmp_path):
    """What of a slice can be run here (see hosts_program.py)."""
    command = [ROOT / "tests" / "xla" / "hosts_program.py", tmp_path]
    run_processes(2, command, PJRT_DEVICE="CPU", CPU_NUM_DEVICES=2)
    hosts = [torch.load(tmp_path / f"{i}.pt") for i in range(2)]
    assert [host["who"] for host in hosts] == [(0, 2, True, 2), (1, 2, False, 2)]
    assert [host["written"] for host in hosts] == [["step-00000001.pt"], False]
    batch = torch.arange(24).view(3, 8)
    for host in hosts:
        assert host["asked to stop"] == [False, False, False, True, False]
        assert host["from main"] == 0 and host["refused"] == "no such file"
        assert torch.equal(host["own"], batch) and torch.equal(host["sums"], batch.sum(1))
        assert torch.equal(host["doubled"], 2 * batch.T)
        assert host["programs kept"] > 0
        assert host["parts of a batch"] == 1  # one program has the whole batch, and no sum is left to the host
