"""Numbers of a run that are not finite: which, since which step, what the weights were like before it, how often."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from runtime.checkpoint import CheckpointFolder, write_atomically
from runtime.errors import RunError
from runtime.run_folder import what_is_kept

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


def count_restart(diagnosis: str, restarts: int, limit: int, checkpoints: CheckpointFolder, advice: str) -> int:
    """One more than `restarts`.

    Raises:
        RunError: that is above `limit`; with the diagnosis, the checkpoint that is left, and the advice.
    """
    if restarts >= limit:
        raise RunError(
            f"not finite at {diagnosis}. Gone back {restarts} times, as --guard.max-restarts {limit} allows. "
            f"{what_is_kept(checkpoints)} {advice}"
        )
    return restarts + 1


def _strings(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinities."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return ", ".join(texts[:NAMED]) + more
