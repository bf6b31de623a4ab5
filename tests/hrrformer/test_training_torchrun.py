"""Several processes that share every batch train what one does."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_hrrformer import tiny_text_config

from hrrformer import checkpoints
from hrrformer.training import train
from runtime.checkpoint import load
from runtime.config import to_dict

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from hrrformer.config import TrainConfig
from hrrformer.training import train
from runtime.config import from_dict
train(from_dict(TrainConfig, json.loads(sys.argv[1])))
"""


def test_two_processes_take_the_steps_of_one(tiny_text, tmp_path):
    """Both phases, with accumulation; without dropout, for each process has its own noise."""
    config = tiny_text_config(tiny_text, tmp_path / "one")
    model = replace(config.model, dropout=0.0)
    config = replace(config, pretrain_epochs=0.4, epochs=0.6, accumulation_steps=2, model=model)
    _, result = train(config)

    (tmp_path / "program.py").write_text(PROGRAM)
    two = replace(config, out=str(tmp_path / "two"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *torchrun, tmp_path / "program.py", json.dumps(to_dict(two))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("majority baseline") == 1  # one process talks
    found = json.loads((tmp_path / "two" / "result.json").read_text())
    assert found == pytest.approx(result, rel=1e-4)
    name = "checkpoints/step-00000025.pt"
    one, several = (load(Path(each.out) / name, checkpoints.KIND)["weights"] for each in (config, two))
    for key, value in one.items():
        torch.testing.assert_close(several[key], value, rtol=1e-4, atol=1e-4)
