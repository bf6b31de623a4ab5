"""Numbers of a run that are not finite: which, since which step, what the weights were like before it, how often."""

from __future__ import annotations

import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from runtime.checkpoint import write_atomically
from runtime.errors import RunError
from runtime.guard import Divergence
from runtime.preemption import StopRequest
from runtime.randomness import derive_seed
from runtime.run_folder import explain_failures, what_is_kept

NAMED = 3  # tensors and layers in a message


class Diverged(Exception):
    """`values`: what is not finite, by name; `step`: the first step that was not taken for it, counted from 1."""

    def __init__(self, step: int, values: dict[str, float]) -> None:
        super().__init__(f"step {step}: {values}")
        self.step, self.values = step, values


def non_finite(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """A NaN or infinity of each of the tensors, on the host, that hold one."""
    bad = {name: x[~x.isfinite()] for name, x in tensors.items() if not x.isfinite().all()}
    return {name: float(values[0]) for name, values in bad.items()}


def diagnose(error: Diverged, spectral_norms: Mapping[str, float], folder: Path | None) -> str:
    """One line: the step, the tensors, and the largest spectral norms of the weights before it.

    Args:
        folder: where everything is written to `diagnosis-STEP.json`; None is nowhere.
    """
    largest = sorted(spectral_norms.items(), key=lambda pair: -pair[1] if math.isfinite(pair[1]) else -math.inf)
    if folder is not None:
        found = {"step": error.step, "not_finite": _strings(error.values), "spectral_norms": _strings(dict(largest))}
        text = json.dumps(found, indent=1)
        write_atomically(folder / f"diagnosis-{error.step:08d}.json", lambda file: file.write(text.encode()))
    return (
        f"step {error.step}: {_some([f'{name} is {value}' for name, value in error.values.items()])}; "
        f"largest spectral norms: {_some([f'{name} {value:.3g}' for name, value in largest])}"
    )


class GoesBack(ABC):
    """A run that, where its numbers are not finite, goes back to its newest checkpoint and on with another seed.

    It has `config` (with `seed` and `guard.max_restarts`), `folder`, `processes`, `checkpoints` and `saver`.

    Attributes:
        advice: what to try when that was done too often.
        guarded_from: the step that its guard counts from.
        restarts, seed: how often it went back, and the seed of all noise and of the data order that follows from it.
    """

    advice: str
    guarded_from: int
    restarts: int
    seed: int

    @abstractmethod
    def start(self) -> None:
        """Puts the run to its first step."""

    @abstractmethod
    def resume(self) -> Path | None:
        """Continues from the newest whole checkpoint, if there is one."""

    @abstractmethod
    def spectral_norms(self) -> dict[str, float]:
        """Of the weights, by name, for the diagnosis."""

    @abstractmethod
    def _train(self, stop: StopRequest) -> None:
        """Trains from where the run is; raises Diverged where numbers are not finite."""

    def train(self, stop: StopRequest) -> None:
        """Trains to the end or until a process is asked to stop; a checkpoint is there in both cases.

        Raises:
            RunError: numbers that are not finite, too often, a disk that is full, or what else ends `_train`. The
                newest checkpoint stays.
        """
        finished = False
        while not finished:
            with explain_failures(self.checkpoints):
                try:
                    self._train(stop)
                    finished = True
                except Diverged as error:
                    self.go_back(error)

    def refuse_divergence(self, read: Callable[[], Divergence | None]) -> None:
        """Raises Diverged where a reader of the guard, from this step or one before it, says so."""
        if found := read():
            raise Diverged(self.guarded_from + found.steps + 1, found.values)

    def go_back(self, error: Diverged) -> None:
        """To the newest checkpoint, or to the start, and on from there with other noise and another data order.

        Raises:
            RunError: that was done too often.
        """
        norms = self.spectral_norms()
        text = self.processes.from_main(lambda: diagnose(error, norms, self.folder))
        self.processes.from_main(self.saver.wait)
        restarts, limit = self.restarts + 1, self.config.guard.max_restarts
        if restarts > limit:
            raise RunError(
                f"not finite at {text}. Gone back {self.restarts} times, as --guard.max-restarts {limit} allows. "
                f"{what_is_kept(self.checkpoints)} {self.advice}"
            )
        path = self.resume()
        if path is None:
            self.start()
        self._count_restarts(restarts)
        if self.processes.is_main:
            where = path or "the start"
            warnings.warn(f"not finite at {text}. Back to {where}, time {restarts} of {limit}.", stacklevel=2)

    def _count_restarts(self, restarts: int) -> None:
        self.restarts = restarts
        self.seed = derive_seed("restart", self.config.seed, restarts) if restarts else self.config.seed


def _strings(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinities."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return ", ".join(texts[:NAMED]) + more
