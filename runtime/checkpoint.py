"""Checkpoints: one torch file each, written atomically, verified by a checksum, loaded without running any code in it.

A checkpoint is a tree of dicts, lists, tensors, numbers and strings. `save` adds the format, the library versions and
a SHA-256 over the whole tree; `load` refuses a file whose content does not have that sum.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from runtime.errors import UserError
from runtime.torch_files import is_archive, read_torch_file

_PATTERN = re.compile(r"step-(\d+)\.pt")
_TYPED = "typed-sha256 "  # what a sum begins with that `checksum` made


def save(path: str | os.PathLike, tree: dict[str, Any], kind: str) -> None:
    """Writes `tree` to `path`: to a temporary name in the same folder first, flushed to disk, then renamed.

    Whatever happens on the way, `path` holds either its old content or the whole new one.

    Raises:
        OSError: the disk is full or not writable; the temporary file is removed.
    """
    path = Path(path)
    tree = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), tree)
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    tree = {**tree, "format": kind, "versions": versions}
    tree["checksum"] = _TYPED + checksum(tree)
    write_atomically(path, lambda file: torch.save(tree, file))


def load(path: str | os.PathLike, kind: str) -> dict[str, Any]:
    """Reads and verifies a checkpoint of this `kind`; tensors are on the CPU.

    Raises:
        UserError: there is no such file, it is damaged, holds code, or is a checkpoint of another program.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}.")
    tree = read_torch_file(path) if is_archive(path) else None
    if not isinstance(tree, dict) or "format" not in tree or "checksum" not in tree:
        raise UserError(
            f"{path} is damaged or was not written by this program "
            "(weights of other BigGANs: python -m tools.convert_biggan)."
        )
    if not _has_sum(tree, tree.pop("checksum")):
        raise UserError(f"{path} is damaged: its content does not match its checksum.")
    if tree["format"] != kind:
        raise UserError(f"{path} is a checkpoint of '{tree['format']}', not of '{kind}'.")
    return tree


class CheckpointFolder:
    """The checkpoints of one run, `step-00001200.pt` and so on; keeps the newest `keep`."""

    def __init__(self, folder: str | os.PathLike, kind: str, keep: int = 3):
        self.folder, self.kind, self.keep = Path(folder), kind, keep

    def paths(self) -> list[Path]:
        """Oldest first."""
        found = [p for p in self.folder.glob("step-*.pt") if _PATTERN.fullmatch(p.name)]
        return sorted(found, key=lambda p: int(_PATTERN.fullmatch(p.name)[1]))

    def save(self, step: int, tree: dict[str, Any]) -> Path:
        """Writes the checkpoint of `step`, then removes those beyond the newest `keep`."""
        path = self.save_as(f"step-{step:08d}.pt", tree)
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def save_as(self, name: str, tree: dict[str, Any]) -> Path:
        """Writes a checkpoint that stays until another is written under its name, such as `best.pt`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.writing"):  # of a run that was killed while it wrote
            leftover.unlink(missing_ok=True)
        save(self.folder / name, tree, self.kind)
        return self.folder / name

    def load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole; damaged ones are reported and passed over. None where there is none.

        Raises:
            UserError: there are checkpoints and none is whole.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return path, load(path, self.kind)
            except UserError as error:
                warnings.warn(f"{error} Trying the checkpoint before it.", stacklevel=2)
        if paths:
            raise UserError(
                f"none of the {len(paths)} checkpoints in {self.folder} can be read; "
                "move the folder away to start again."
            )
        return None


class BackgroundSaver:
    """Saves to a folder while the program goes on: it waits for the copy to host memory, not for the disk.

    A save that failed raises its error from the next `save` or `wait`.

    Args:
        writes: False in all but one of several processes. They save too, and only copy: what lies on the devices of
            several hosts can only be copied by all of them together.
        copy: as `host_copy`, such as `Device.to_host`.
    """

    def __init__(self, folder: CheckpointFolder, writes: bool = True, copy: Callable[[Any], Any] | None = None):
        self.folder = folder
        self.writes = writes
        self.copy = copy or host_copy
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, step: int, tree: dict[str, Any]) -> None:
        """As `CheckpointFolder.save`. Values in `tree` may change as soon as this returns."""
        self._start(self.folder.save, step, tree)

    def save_as(self, name: str, tree: dict[str, Any]) -> None:
        """As `CheckpointFolder.save_as`; otherwise as `save`."""
        self._start(self.folder.save_as, name, tree)

    def wait(self) -> None:
        """Until the last save is on the disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    def check(self) -> None:
        """Raises what a save failed with that has ended by now; does not wait for one that has not."""
        if self.thread is not None and not self.thread.is_alive():
            self.wait()

    def _start(self, write: Callable[..., Any], name: int | str, tree: dict[str, Any]) -> None:
        self.wait()
        tree = self.copy(tree)
        if not self.writes:
            return
        self.thread = threading.Thread(target=self._write, args=(write, name, tree), name="checkpoint")
        self.thread.start()  # not a daemon: the interpreter ends only after it

    def _write(self, write: Callable[..., Any], name: int | str, tree: dict[str, Any]) -> None:
        try:
            write(name, tree)
        except BaseException as error:
            self.error = error


def host_copy(tree: Any) -> Any:
    """The tree with copies of its tensors in host memory."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), tree)


def checksum(tree: Any) -> str:
    """SHA-256 over keys, values, types and shapes of a tree, whatever the order of its keys."""

    def mark(node: Any, text: str) -> None:
        digest.update(f"{type(node).__name__} {len(text)} {text}".encode())

    digest = hashlib.sha256()
    _digest(tree, mark, digest.update)
    return digest.hexdigest()


def _has_sum(tree: dict[str, Any], found: Any) -> bool:
    try:
        if str(found).startswith(_TYPED):
            return found == _TYPED + checksum(tree)
        digest = hashlib.sha256()  # of before types and lengths were part of it: [1, 23] had the sum of (12, 3)
        _digest(tree, lambda node, text: digest.update(text.encode()), digest.update)
        return found == digest.hexdigest()
    except Exception:  # tensors of kinds that have no bytes to look at, such as sparse ones
        return False


def _digest(node: Any, mark: Callable[[Any, str], None], update: Callable[[bytes], None]) -> None:
    """Calls `mark(node, what it is)` on everything in a tree, and `update` on the bytes of tensors."""
    if isinstance(node, dict):
        mark(node, f"{{{len(node)}")
        for key in sorted(node, key=repr):
            mark(key, repr(key))
            _digest(node[key], mark, update)
    elif isinstance(node, list | tuple):
        mark(node, f"[{len(node)}")
        for item in node:
            _digest(item, mark, update)
    elif isinstance(node, torch.Tensor):
        mark(node, f"{node.dtype}{tuple(node.shape)}")
        update(node.contiguous().flatten().view(torch.uint8).numpy().data)
    else:
        mark(node, repr(node))


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Calls `write(file)` on a temporary file beside `path`, flushes it to disk and renames it to `path`."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch's writer hides why a write failed, most often a full disk
        full = shutil.disk_usage(path.parent).free < 2**20
        temporary.unlink(missing_ok=True)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # not every one names its file
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The rename itself reaches the disk only with its folder (POSIX)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
