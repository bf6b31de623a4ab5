"""Thousands of damaged files: each gives content or one clear error, never a crash, a hang or a wrong checkpoint."""

import json
import subprocess
import sys

import pytest
from launch import ROOT, environment

FEW = {"images": 230, "checkpoints": 60, "containers": 90, "formats": 120, "foreign": 60, "tokens": 140}
MANY = {"images": 5000, "checkpoints": 2000, "containers": 1500, "formats": 3000, "foreign": 1000, "tokens": 1400}


@pytest.mark.parametrize("counts", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_damaged_files(counts):
    command = [sys.executable, "tests/fuzz_program.py", "0", *(f"{kind}={count}" for kind, count in counts.items())]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]  # below zero: a signal, such as a segmentation fault
    found = json.loads(done.stdout)
    print(json.dumps(found, indent=2))
    for kind, count in counts.items():
        outcomes = found[kind]["outcomes"]
        assert sum(outcomes.values()) == count and outcomes["refused"] > count / 3
        assert outcomes.keys() <= {"refused", "same" if kind == "checkpoints" else "read"}
        assert found[kind]["longest_sec"] < 10 and found[kind]["grown_mib"] < 1024
    assert found["checkpoints"]["outcomes"].get("same", 0) < counts["checkpoints"] / 10
