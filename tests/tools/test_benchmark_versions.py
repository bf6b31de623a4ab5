"""The benchmark of training steps between versions: what it refuses, and that a run of it ends with a line for each."""

import json
import subprocess
import sys

import pytest

from runtime.cli import run_command
from runtime.errors import RunError
from tools import benchmark_versions


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--against", "/nowhere"], "/nowhere is no checkout of this repository"),
        (["--environment", "GOMP_SPINCOUNT"], "takes VARIABLE=VALUE"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(argv, message, capsys):
    assert run_command(benchmark_versions.main, argv) == 2
    assert message in capsys.readouterr().err


def test_versions_that_train_something_else_are_refused():
    assert benchmark_versions.difference("other", {"loss_g": 0.0}, {"loss_g": 1e-5}) == 1e-5
    with pytest.raises(RunError, match="other does not train the same run"):
        benchmark_versions.difference("other", {"loss_g": 2.0}, {"loss_g": 2.01})
    with pytest.raises(RunError, match="does not train"):
        benchmark_versions.difference("other", {"loss_g": 2.0}, {"loss_g": float("nan")})


def test_a_run_compares_environments_and_this_checkout(tmp_path):
    command = [sys.executable, "-m", "tools.benchmark_versions", "--batch-size", "2", "--rounds", "1", "--threads", "1"]
    command += ["--environment", "GOMP_SPINCOUNT=0", "--json", str(tmp_path / "versions.json")]
    subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "versions.json").read_text())["results"]
    assert [row["version"] for row in rows] == ["here", "GOMP_SPINCOUNT=0"]
    assert all(row["difference"] == 0 and row["wall_ms"] > 0 for row in rows)


def test_an_unknown_preset_is_one_line():
    command = [sys.executable, "-m", "tools.benchmark_versions", "--preset", "fases64"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "faces64" in run.stderr
