"""The state of a training run: how it starts, resumes, is saved, and goes back.

All randomness of step n comes from (seed, n), so a resumed run is the uninterrupted one. A run whose numbers are not
finite goes back to its newest checkpoint, and on from there with another seed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hrrformer.checkpoints import BEST, KIND, load_encoder, read_encoder
from hrrformer.config import TrainConfig
from hrrformer.data import TaskData
from hrrformer.evaluation import Evaluator
from hrrformer.learner import Learner, build_classifier
from hrrformer.phases import Phase, phases_of
from hrrformer.run_setup import describe_data, refuse_other_run
from runtime.checkpoint import BackgroundSaver, CheckpointFolder, load
from runtime.config import to_dict
from runtime.device import Device
from runtime.divergence import Diverged, GoesBack, non_finite
from runtime.randomness import derive_seed
from runtime.run_folder import require_keys
from runtime.run_log import RunningMeans
from runtime.state import load_weights


class RunState(GoesBack):
    """One run in its directory, at some step."""

    advice = "Try a lower --optimizer.lr, --optimizer.clip-grad-norm 1 or another --seed."

    def __init__(self, config: TrainConfig, data: TaskData, device: Device, folder: Path) -> None:
        self.config, self.data, self.device, self.folder = config, data, device, folder
        self.checkpoints = CheckpointFolder(folder / "checkpoints", KIND, config.log.keep_checkpoints)
        self.processes = device.processes
        self.saver = BackgroundSaver(self.checkpoints, self.processes.is_main, self._copy_finite)
        device.seed(derive_seed("weights", config.seed))
        self.classifier = build_classifier(config)
        batch_size = config.batch_size // config.accumulation_steps
        self.evaluator = Evaluator(
            self.classifier, device, batch_size, config.length_buckets, config.precision, config.compile
        )
        self.best: dict[str, Any] | None = None  # step, accuracy and loss of the best validation
        self._begin()

    def _begin(self) -> None:
        """What a run counts, as it is before the first step."""
        self.step, self.elapsed_sec, self.guarded_from = 0, 0.0, 0
        self.phase: Phase | None = None
        self._count_restarts(0)

    def start(self) -> None:
        """Puts a run to its first step: with the weights of its seed, and the encoder that it is told to start from."""
        self._begin()
        self.device.seed(derive_seed("weights", self.config.seed))
        load_weights(self.classifier, build_classifier(self.config).state_dict(), "network")
        if path := self.config.initial_weights:
            load_encoder(self.classifier, self.processes.from_main(lambda: read_encoder(path, self.config.task)))

    def enter(self, phase: Phase) -> None:
        """Makes the phase's objective with a new optimizer around the classifier."""
        self.phase = phase
        self.device.seed(derive_seed("weights", phase.name, self.seed))
        objective = phase.objective(self.classifier)
        self.device.put_network(objective, torch.contiguous_format)
        self.learner = Learner(objective, self.config, self.device)
        self.guarded_from = self.step
        self.means = RunningMeans(Learner.STEP_VALUES, self.device.put)

    def resume(self) -> Path | None:
        """Continues from the newest whole checkpoint, if there is one.

        Raises:
            UserError: the folder belongs to a run with another configuration or other data.
        """
        newest = self.processes.from_main(self.checkpoints.load_newest)  # the others may not see its disk
        if newest is None:
            return None
        path, tree = newest
        require_keys(path, tree, ("config", "phase", "step", "weights", "optimizer", "progress", "data"))
        refuse_other_run(tree, self.config, self.data)
        progress = tree["progress"]
        self.step, self.elapsed_sec = tree["step"], progress["elapsed_sec"]
        self._count_restarts(progress.get("restarts", 0))
        self.enter(next(phase for phase in self.phases if phase.name == tree["phase"]))
        self.learner.load_state_dict(tree)
        self.means.load_state_dict(progress["means"])
        best = self.checkpoints.folder / BEST
        self.best = self.processes.from_main(lambda: load(best, KIND)["validation"] if best.exists() else None)
        return path

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint.

        Raises:
            Diverged: numbers are not finite.
        """
        self.refuse_divergence(self.learner.guard.reader())
        progress = {"elapsed_sec": self.elapsed_sec, "means": self.means.state_dict(), "restarts": self.restarts}
        return {
            "config": to_dict(self.config),
            "phase": self.phase.name,
            "step": self.step,
            **self.learner.state_dict(),
            "progress": progress,
            "data": describe_data(self.data),
        }

    def _copy_finite(self, tree: dict[str, Any]) -> dict[str, Any]:
        tree = self.device.to_host(tree)
        if bad := non_finite(tree["weights"]):
            raise Diverged(self.step, bad)
        return tree

    def spectral_norms(self) -> dict[str, float]:
        """Of the weight matrices whose entries are finite."""
        state = self.device.to_host(self.learner.objective.state_dict()).items()
        return {name: float(torch.linalg.matrix_norm(x, 2)) for name, x in state if x.ndim == 2 and x.isfinite().all()}

    def _count_restarts(self, restarts: int) -> None:
        """Batches, dropout and hidden tokens follow from `seed`; the length of a phase does not."""
        super()._count_restarts(restarts)
        self.phases = phases_of(replace(self.config, seed=self.seed), self.data)
        if self.phase:
            self.phase = next(phase for phase in self.phases if phase.name == self.phase.name)
