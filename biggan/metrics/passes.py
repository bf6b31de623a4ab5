"""One pass over many images that may be stopped at any batch and goes on from there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from biggan.metrics.features import Rows, holds
from runtime import checkpoint
from runtime.distributed import Processes
from runtime.errors import RunError, UserError
from runtime.preemption import StopRequest
from runtime.progress import track

KIND = "biggan-evaluation"
SAVE_EVERY_SEC = 300
LONG_PASS_SEC = 30


class Part(Protocol):
    """What a pass fills, by whatever method."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SavedPass:
    """Where a pass stands, in a folder named by what it computes: the same command finds it, another one does not.

    Of several processes the first alone keeps parts and writes.

    Args:
        folder: None saves nothing, and leaves signals to the caller.
            Otherwise SIGTERM and Ctrl-C stop the pass after a batch.
    """

    def __init__(self, folder: Path | None, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self.parts: Mapping[str, Part] = {}

    def rows(self, name: str, num_rows: int, shape: tuple[int, ...], dtype: type) -> Rows:
        """Rows in the folder; where it does not have them yet, the pass starts anew."""
        path = None if self.folder is None else self.folder / f"{name}.npy"
        if path is not None and not holds(path, (num_rows, *shape), dtype):
            self._file.unlink(missing_ok=True)
        return Rows(path, num_rows, shape, dtype)

    def resume(self, parts: Mapping[str, Part]) -> int:
        """Restores the parts and returns the number of images that they have seen, in all processes."""
        self.parts = parts
        return self.processes.from_main(self._load)

    def _load(self) -> int:
        if self.folder is None or not self._file.exists():
            return 0
        try:
            state = checkpoint.load(self._file, KIND)
        except UserError as error:
            warnings.warn(f"{error} The evaluation starts anew.", stacklevel=2)
            return 0
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        return state["images"]

    def batches(
        self, batches: Iterable[Tensor], first: int, num_images: int, description: str, progress: bool
    ) -> Iterator[Tensor]:
        """Yields the batches from image number `first` on; what the caller does with one is done when it asks for more.

        Raises:
            RunError: the process was asked to stop; what was done is saved.
        """
        if first == num_images:
            return
        done, saved_at = first, time.monotonic()
        with StopRequest() if self.folder else contextlib.nullcontext() as stop:
            for images in tracked(batches, num_images - first, _from(description, first), progress):
                yield images
                done += len(images)
                if self.folder is None:
                    continue
                stopping = self.processes.any(bool(stop))
                if stopping or time.monotonic() - saved_at > SAVE_EVERY_SEC:
                    self._save(done)
                    saved_at = time.monotonic()
                if stopping:
                    raise RunError(f"stopped after {done:,} of {num_images:,} images; the same command goes on there")

            if self.folder is not None and time.monotonic() - saved_at > LONG_PASS_SEC:
                self._save(done)  # what is computed from it takes a while too, and may be interrupted

    def _save(self, done: int) -> None:
        if self.processes.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            checkpoint.save(self._file, {"images": done, "parts": parts}, KIND)

    @property
    def _file(self) -> Path:
        return self.folder / "state.pt"

    def remove(self) -> None:
        """To be called when the result is there."""
        if self.folder is not None and self.processes.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)


def digest(identity: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name what a pass computes."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def tracked(batches: Iterable[Tensor], num_images: int, description: str, enabled: bool) -> Iterator[Tensor]:
    """Yields the batches and shows the progress in batches, all taken to be as large as the first."""
    batches = iter(batches)
    first = next(batches, None)
    if first is not None:
        total = math.ceil(num_images / max(1, len(first)))
        yield from track(chain([first], batches), total, f"{description}, batches", enabled)


def _from(description: str, first: int) -> str:
    return f"{description} from number {first:,} on" if first else description
