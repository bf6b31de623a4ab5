"""What a checkpoint of a run holds, and how a classifier comes back from one.

Keys: `config` (the whole TrainConfig as plain values), `phase` (pretrain or train), `step`, `weights` (those of the
phase's objective, the classifier's under `classifier.`), and of a run also `optimizer`, `progress` and `data`.
Beside the newest `step-*.pt` of a run are `best.pt`, the weights with the highest validation accuracy, and
`pretrained.pt`, those at the end of a pretraining.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hrrformer.config import TrainConfig
from hrrformer.learner import build_classifier
from hrrformer.model import SequenceClassifier
from runtime.checkpoint import load
from runtime.config import from_dict
from runtime.errors import UserError
from runtime.run_folder import read_checkpoint
from runtime.state import load_weights

KIND = "hrrformer"
BEST, PRETRAINED = "best.pt", "pretrained.pt"
_PREFIX, _READOUT = "classifier.", "readout."


def read(path: str | Path) -> tuple[Path, TrainConfig, dict[str, Any]]:
    """A checkpoint, or of a run directory its best one, or the newest where there is no best yet.

    Raises:
        UserError: there is none, or it is damaged, holds code, or is another program's.
    """
    path = Path(path)
    best = path / "checkpoints" / BEST
    path, tree = (best, load(best, KIND)) if best.is_file() else read_checkpoint(path, KIND)
    return path, from_dict(TrainConfig, tree.get("config"), f"configuration in {path}"), tree


def load_classifier(path: str | Path) -> tuple[SequenceClassifier, TrainConfig, dict[str, Any], Path]:
    """A classifier in evaluation mode on the CPU, its configuration, and the checkpoint's content and file.

    Raises:
        UserError: as `read`, and where the checkpoint is of a pretraining.
    """
    path, config, tree = read(path)
    if tree["phase"] != "train":
        raise UserError(f"{path} holds a pretrained encoder, no classifier yet: let its run go on to the task.")
    classifier = build_classifier(config)
    load_weights(classifier, classifier_weights(tree), "network")
    return classifier.eval().requires_grad_(False), config, tree, path


def read_encoder(path: str | Path, task: str) -> dict[str, torch.Tensor]:
    """All weights but the readout's.

    Raises:
        UserError: as `read`, and where the checkpoint is of another task.
    """
    path, config, tree = read(path)
    if config.task != task:
        raise UserError(f"{path} is a checkpoint of the task {config.task}, not of {task}.")
    return {name: value for name, value in classifier_weights(tree).items() if not name.startswith(_READOUT)}


def load_encoder(classifier: SequenceClassifier, weights: dict[str, torch.Tensor]) -> None:
    """Puts what `read_encoder` returns into a classifier, whose readout stays.

    Raises:
        UserError: the weights are of another architecture.
    """
    own = {name: value for name, value in classifier.state_dict().items() if name.startswith(_READOUT)}
    load_weights(classifier, own | weights, "encoder")


def classifier_weights(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The classifier's state in a checkpoint of either phase."""
    found = tree["weights"].items()
    return {name.removeprefix(_PREFIX): value for name, value in found if name.startswith(_PREFIX)}
