"""The log of a run: `stats.jsonl` (a line a tick), TensorBoard, a progress bar, and running means between ticks."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime.checkpoint import write_atomically


class RunningMeans:
    """Means of detached scalar tensors between ticks, summed where they are.

    `float(tensor)` makes the host wait for the device, so it happens once a tick and not once a step. On a device that
    compiles whole steps, call `add` inside the step: the sums enter and leave it as tensors of fixed number and shape.
    """

    def __init__(self, names: Sequence[str], put: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """`put` brings a host tensor to the device that sums."""
        self.names, self.put = tuple(names), put
        self.sums = put(torch.zeros(len(names)))
        self.count = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        self.sums = self.sums + torch.stack([values[name].float() for name in self.names])
        self.count += 1

    def take(self) -> Callable[[], dict[str, float]]:
        """Starts again from nothing; the function returned waits for the device and gives the means until here."""
        names, sums, count = self.names, self.sums, max(self.count, 1)
        self.sums, self.count = self.put(torch.zeros(len(names))), 0
        return lambda: {name: total / count for name, total in zip(names, sums.tolist(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(zip(self.names, self.sums.cpu().clone(), strict=True)), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = self.put(torch.stack([state["sums"].get(name, torch.zeros(())) for name in self.names]))
        self.count = state["count"]


class RunLog:
    """Writes ticks. Lines after `step_at_start`, where the run starts or resumes, are an interrupted run's: dropped.

    Of several processes one writes; the others have a log with `writes=False`, which does nothing.
    """

    def __init__(self, folder: Path, step_at_start: int = 0, writes: bool = True):
        self.writes = writes
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self.path = folder / "stats.jsonl"
        self._drop_lines_after(step_at_start)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        purge_step = step_at_start + 1 if step_at_start else None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line. NaN and infinities, which JSON does not know, become strings."""
        if not self.writes:
            return
        line = {"step": step, **values}
        self.file.write(json.dumps({key: _json_number(value) for key, value in line.items()}) + "\n")
        self.file.flush()
        for key, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(key, value, step)

    def sync(self) -> None:
        """Brings the lines to the disk, so that no checkpoint that follows can outlive them in a power failure."""
        if self.writes:
            os.fsync(self.file.fileno())

    def image(self, step: int, name: str, image: torch.Tensor) -> None:
        """`image`: uint8 (3, H, W)."""
        if self.writes:
            self.writer.add_image(name, image, step)

    def close(self) -> None:
        if self.writes:
            self.file.close()
            self.writer.close()

    def _drop_lines_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):  # half a line of a killed run
                continue
        text = "".join(line + "\n" for line in kept)
        write_atomically(self.path, lambda file: file.write(text.encode()))


class Progress:
    """A tqdm bar on a terminal; elsewhere one plain line a tick; nothing at all with `shows=False`."""

    def __init__(self, total: float, initial: float, unit: str, shows: bool = True):
        self.shows = shows
        self.terminal = shows and sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=initial,
            unit=unit,
            disable=not self.terminal,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} {unit} [{elapsed}<{remaining}{postfix}]",
        )

    def advance(self, amount: float) -> None:
        self.bar.update(amount)

    def tick(self, text: str) -> None:
        """`text`: the tick in a few words, such as `kimg 1.2  loss_d 0.81`."""
        if self.terminal:
            self.bar.set_postfix_str(text)
        elif self.shows:
            print(text, file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """A line above the bar."""
        if self.shows:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
