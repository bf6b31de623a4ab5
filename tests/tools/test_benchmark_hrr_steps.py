"""The whole-step benchmark: its networks are the presets', and the original's operations give what ours give."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hrrformer.learner import build_classifier
from hrrformer.presets import get_preset
from runtime.errors import UserError
from tools import benchmark_hrr_steps, hrr_networks

JAX_PYTHON = Path("/tmp/jaxenv/bin/python")


@pytest.mark.parametrize("task", benchmark_hrr_steps.TASKS)
def test_sizes_and_weights_are_the_presets(task):
    size, config = hrr_networks.SIZES[task], get_preset(task, "single")
    model = config.model
    assert size == {
        "vocab": model.vocab_size,
        "tokens": model.max_length,
        "classes": model.num_outputs,
        "dim": model.dim,
        "heads": model.num_heads,
        "mlp": model.mlp_dim,
        "norm": model.norm,
    }
    classifier = build_classifier(config)
    classifier.load_state_dict({name: torch.from_numpy(x) for name, x in hrr_networks.weights_of(task).items()})
    torch.testing.assert_close(
        torch.from_numpy(hrr_networks.sinusoids(model.max_length, model.dim)), classifier.sinusoids, rtol=0, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.skipif(not JAX_PYTHON.exists(), reason=f"needs {JAX_PYTHON} with jax, flax, hrr and optax")
def test_a_run_agrees_with_jax_and_prints_a_line_a_task(tmp_path):
    command = [sys.executable, "-m", "tools.benchmark_hrr_steps", "--jax-python", str(JAX_PYTHON), "--tasks", "image"]
    command += ["--batch-size", "1", "--rounds", "1", "--steps", "1", "--json", str(tmp_path / "steps.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "'task': 'image'" in result.stdout and (tmp_path / "steps.json").exists()


def test_unknown_tasks_are_named():
    with pytest.raises(UserError, match="available: image, text"):
        benchmark_hrr_steps.main(["--tasks", "pathx"])
