"""Numbers of a run that are not finite: which, since which step, and what the networks were like before it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from runtime.checkpoint import write_atomically

NAMED = 3  # tensors and layers in a message
NETWORKS = ("generator", "discriminator", "ema_generator")


class Diverged(Exception):
    """`values`: what is not finite, by name; `step`: the first step that was not taken for it, counted from 1."""

    def __init__(self, step: int, values: dict[str, float]) -> None:
        super().__init__(f"step {step}: {values}")
        self.step, self.values = step, values


def non_finite(tree: dict[str, Any]) -> dict[str, float]:
    """The weights and statistics in the content of a checkpoint, on the host, that hold a NaN or an infinity."""
    tensors = {f"{name}.{key}": x for name in NETWORKS for key, x in tree.get(name, {}).items()}
    bad = {name: x[~x.isfinite()] for name, x in tensors.items() if not x.isfinite().all()}
    return {name: float(values[0]) for name, values in bad.items()}


def diagnose(error: Diverged, networks: dict[str, dict[str, Tensor]], folder: Path | None) -> str:
    """One line: the step, the tensors, and the largest spectral norms of the weights before it.

    Args:
        networks: the states of the networks, on the host; spectral norms are those that their layers have stored.
        folder: where everything is written to `diagnosis-STEP.json`; None is nowhere.
    """
    norms = {
        f"{name}.{key.removesuffix('.sv0')}": float(value)
        for name, state in networks.items()
        for key, value in state.items()
        if key.endswith(".sv0")
    }
    largest = sorted(norms.items(), key=lambda pair: -pair[1] if math.isfinite(pair[1]) else -math.inf)
    if folder is not None:
        found = {"step": error.step, "not_finite": _strings(error.values), "spectral_norms": _strings(dict(largest))}
        text = json.dumps(found, indent=1)
        write_atomically(folder / f"diagnosis-{error.step:08d}.json", lambda file: file.write(text.encode()))
    return (
        f"step {error.step}: {_some([f'{name} is {value}' for name, value in error.values.items()])}; "
        f"largest spectral norms: {_some([f'{name} {value:.3g}' for name, value in largest])}"
    )


def _strings(values: dict[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinities."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return ", ".join(texts[:NAMED]) + more
