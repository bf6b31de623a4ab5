"""`biggan evaluate` as it is typed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from launch import ROOT, environment

from biggan.__main__ import dispatch
from biggan.pictures import save_npz, save_png
from runtime.cli import run_command

NETWORK = ("--network", "torchvision:resnet18@32", "--network-weights", "random", "--device", "cpu")


def pictures(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Generated images in an archive, real ones in a folder."""
    save_npz(pictures(0, 24), torch.zeros(24, dtype=torch.int64), tmp_path / "generated.npz")
    (tmp_path / "real" / "train").mkdir(parents=True)
    for i, picture in enumerate(pictures(1, 30)):
        save_png(picture, tmp_path / "real" / "train" / f"{i}.png")
    return tmp_path / "generated.npz", tmp_path / "real" / "train"


def run(*argv: object) -> int:
    return run_command(dispatch, [str(word) for word in ("evaluate", *argv)])


def test_data_then_its_statistics(sides: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, data = sides
    common = ("--samples", samples, "--metrics", "fid,kid,prdc", *NETWORK, "--cache", tmp_path / "cache")
    files = ("--save-statistics", tmp_path / "real.npz", "--json", tmp_path / "values.json")
    assert run(*common, "--data", data, *files) == 0
    first = capsys.readouterr()
    assert "fd24_infinite" in first.out and "of 24 images only" in first.err
    record = json.loads((tmp_path / "values.json").read_text())
    assert record["protocol"]["fid"]["split"] == "train" and record["protocol"]["fid"]["reference_count"] == 30
    assert run(*common, "--statistics", tmp_path / "real.npz") == 0
    assert capsys.readouterr().out == first.out
    assert run(*common, "--statistics", tmp_path / "real.npz", "--resize-rule", "tensorflow") == 2
    assert "resize_rule 'clean-fid' there, 'tensorflow' asked" in capsys.readouterr().err
    with np.load(tmp_path / "real.npz") as file:
        assert (int(file["count"]), file["split"].item()) == (30, "train")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--samples", "a.npz"), "--samples needs --data PATH"),
        (("--samples", "a.npz", "--data", "b", "--statistics", "c"), "either --data PATH or --statistics FILE"),
        (("--samples", "a.npz", "--data", "b", "--metrics", "swd", "--save-statistics", "c"), "needs a metric that"),
        (("--samples", "a.npz", "--data", "b", "--metrics", "fid,pr"), "unknown metric 'pr'"),
        (("--samples", "a.npz", "--data", "b"), "a.npz does not exist"),
    ],
)
def test_mistakes_are_said_in_a_line(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv, "--device", "cpu") == 2
    assert message in capsys.readouterr().err


def generated_features(cache: Path) -> list[Path]:
    """Where there are statistics of the data, what is unfinished is the evaluation itself."""
    return [path for path in cache.glob("unfinished-*/features.npy") if list(cache.glob("statistics-*"))]


def test_ctrl_c_stops_and_the_same_command_goes_on(
    sides: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, stopped as soon as there are features of the generated images."""
    samples, data = sides
    save_npz(pictures(0, 400), torch.zeros(400, dtype=torch.int64), samples)
    argv = ("--samples", samples, "--data", data, "--metrics", "fid,kid", *NETWORK, "--batch-size", 8)
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "biggan", "evaluate", *map(str, argv), "--cache", cache]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while not any(np.load(path, mmap_mode="r")[0].any() for path in generated_features(cache)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 1
    assert "the same command goes on there" in process.stderr.read()
    assert [path.name for path in cache.glob("unfinished-*/state.pt")] == ["state.pt"]
    assert run(*argv, "--cache", cache) == 0
    resumed = capsys.readouterr().out
    assert run(*argv, "--cache", cache) == 0
    assert capsys.readouterr().out == resumed
    assert not list(cache.glob("unfinished-*"))


@pytest.mark.slow
def test_two_processes_stop_together_and_find_what_one_finds(tmp_path: Path) -> None:
    program, out = ROOT / "tests" / "evaluate_program.py", tmp_path / "values.json"
    launch.run([program, out, tmp_path / "one", -1])
    expected = json.loads(out.read_text())
    out.unlink()
    stopped = launch.start_processes(2, [program, out, tmp_path / "two", 20])
    assert all("stopped after" in process.communicate(timeout=300)[1] for process in stopped)
    assert not out.exists() and len(list((tmp_path / "two").glob("unfinished-*/state.pt"))) == 1
    launch.run_processes(2, [program, out, tmp_path / "two", -1])
    assert json.loads(out.read_text()) == pytest.approx(expected, rel=1e-12)
