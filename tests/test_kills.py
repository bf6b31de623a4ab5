"""Runs that are killed again and again end as the run that nobody touched: every bit, every line, every file."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launch import ROOT, environment
from tiny_hrrformer import pack_text, tiny_text_config

from biggan.config import LogConfig, ModelConfig
from biggan.presets import get_preset
from runtime.checkpoint import checksum
from runtime.config import to_dict

TIMING = {"sec_per_kimg", "elapsed_sec", "peak_memory_gib", "examples_per_sec"}


def gan_config(out, steps):
    """Two images a step, a tick every second step, a checkpoint every second tick; pictures and metrics between."""
    base = get_preset("demo")
    return replace(
        base,
        out=str(out),
        device="cpu",
        total_kimg=2 * steps / 1000,
        global_batch_size=2,
        drawn_faces=24,
        model=ModelConfig(resolution=32, generator_channels=2, discriminator_channels=2, dim_z=8),
        log=LogConfig(
            kimg_per_tick=0.004,
            checkpoint_every_ticks=2,
            sample_every_ticks=3,
            metric_every_ticks=10,
            metric_images=16,
            grid=2,
        ),
    )


def run_and_kill(folder, package, whole, broken, kills, seconds):
    """How the attempts ended, as tests/kill_program.py says it."""
    path = folder / "configs.json"
    path.write_text(json.dumps({"package": package, "whole": to_dict(whole), "broken": to_dict(broken)}))
    command = [sys.executable, ROOT / "tests" / "kill_program.py", path, kills, seconds, 0]
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [tuple(end) for end in json.loads(done.stdout)]


def tree_of(path):
    """The sum over a checkpoint without what differs between two runs: where it is and how long it took."""
    tree = torch.load(path, weights_only=True)
    for key in ("checksum", "config", "versions"):
        tree.pop(key)
    tree["progress"].pop("elapsed_sec")
    return checksum(tree)


def contents(folder):
    """What a run directory holds, file by file, without times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith("tensorboard"):
            continue
        if path.suffix == ".pt":
            found[name] = tree_of(path)
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in TIMING} for line in lines]
        elif path.suffix == ".json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "out" and k not in TIMING}
        else:
            found[name] = path.read_bytes()
    return found


def assert_killed_runs_are_whole(tmp_path, package, config, kills, seconds):
    ends = run_and_kill(tmp_path, package, config, replace(config, out=str(tmp_path / "broken")), kills, seconds)
    killed = {"kill": {-signal.SIGKILL}, "term": {0, -signal.SIGTERM}, "write": {-signal.SIGKILL}}
    assert all(status in killed.get(plan, {0}) for plan, status in ends), ends
    assert len(ends) == kills + 2
    found, expected = contents(tmp_path / "broken"), contents(Path(config.out))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    steps = [line["step"] for line in found["stats.jsonl"]]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_gan_that_is_killed_30_times(tmp_path):
    config = gan_config(tmp_path / "whole", steps=160)
    assert_killed_runs_are_whole(tmp_path, "biggan", config, kills=30, seconds=1.0)


@pytest.mark.slow
def test_a_sequence_model_that_is_killed_30_times(tmp_path):
    base = tiny_text_config(pack_text(tmp_path), tmp_path / "whole")
    config = replace(base, pretrain_epochs=4, epochs=20)
    assert_killed_runs_are_whole(tmp_path, "hrrformer", config, kills=30, seconds=0.3)


def test_runs_that_are_killed_a_few_times(tmp_path):
    config = gan_config(tmp_path / "whole", steps=20)
    assert_killed_runs_are_whole(tmp_path, "biggan", config, kills=4, seconds=0.7)
