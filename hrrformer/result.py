"""The end of a run: its test split is looked at once, with the weights that validation chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hrrformer.checkpoints import BEST, KIND, classifier_weights
from hrrformer.data import TaskData
from hrrformer.evaluation import Evaluator, majority_baseline
from runtime.checkpoint import load, write_atomically
from runtime.distributed import Processes
from runtime.state import load_weights

FILE = "result.json"


def finish(folder: Path, step: int, data: TaskData, evaluator: Evaluator, processes: Processes) -> dict[str, Any]:
    """The result of a run that ended after `step` steps; `result.json` keeps it, so that nothing is tested twice.

    A run that was trained for longer since it was tested is tested again. The evaluator's classifier gets the best
    weights of the run.
    """
    result, best = processes.from_main(lambda: _read(folder))
    if result and result.get("trained_steps") == step:
        return result
    load_weights(evaluator.classifier, classifier_weights(best), "network")
    found = evaluator(data.test, progress=True)
    result = {
        "trained_steps": step,
        "best_step": best["step"],
        "validation_accuracy": best["validation"]["accuracy"],
        "test_accuracy": found.accuracy,
        "test_loss": found.loss,
        "test_examples": found.examples,
        "test_majority_baseline": majority_baseline(data.test.labels)[0],
        "parameters": sum(p.numel() for p in evaluator.classifier.parameters()),
    }
    if processes.is_main:
        write_atomically(folder / FILE, lambda file: file.write(json.dumps(result, indent=2).encode()))
    return result


def _read(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """An earlier result, if there is a sound one, and the best checkpoint."""
    try:
        earlier = json.loads((folder / FILE).read_text())
    except (FileNotFoundError, ValueError):
        earlier = None
    return earlier if isinstance(earlier, dict) else None, load(folder / "checkpoints" / BEST, KIND)
