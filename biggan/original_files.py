"""Reads the files of a BigGAN-PyTorch checkpoint without running any code in them.

A checkpoint is a folder of `G.pth G_ema.pth D.pth G_optim.pth D_optim.pth state_dict.pth`, some of which may be
missing; copies in the same folder carry a suffix: `G_copy0.pth`, `G_best1.pth`.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.errors import UserError
from runtime.torch_files import check_archive, damaged, plain

FILES = ("G", "G_ema", "D", "G_optim", "D_optim", "state_dict")


class _Activation:
    """Stands for the activation modules in a stored configuration."""


class _Dtype:
    """Stands for numpy's, which takes flags from a pickle that make it read any bytes as pointers to objects."""

    def __init__(self, name: str, *_: Any) -> None:
        if name not in ("f2", "f4", "f8", "i4", "i8"):
            raise pickle.UnpicklingError(f"unexpected type {name} of a number")
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(dtype: _Dtype, data: bytes) -> float | int:
    """A numpy scalar of a pickle, as a number of Python."""
    return np.frombuffer(data, dtype.order + dtype.name)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"unexpected encoding {encoding}")
    return text.encode(encoding)


# All that `state_dict.pth` may name beyond plain data: the activations of the configuration, and what numpy scalars
# among the best scores are made of. numpy 2 moved the function that such pickles name.
_ALLOWED = {
    "torch.nn.modules.activation.ReLU": _Activation,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
}


def read_original(folder: Path, suffix: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """The contents of the files that are there, by the names of `FILES`, and the file names that are missing.

    Raises:
        UserError: there is no such folder, neither G nor G_ema is in it, or a file is damaged or holds code.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give the folder that holds G.pth, D.pth and state_dict.pth.")
    paths = {name: folder / (f"{name}_{suffix}.pth" if suffix else f"{name}.pth") for name in FILES}
    contents = {name: _read(path) for name, path in paths.items() if path.is_file()}
    if "G" not in contents and "G_ema" not in contents:
        raise UserError(f"neither {paths['G'].name} nor {paths['G_ema'].name} is in {folder}.{_other_copies(folder)}")
    return contents, [path.name for name, path in paths.items() if name not in contents]


def _other_copies(folder: Path) -> str:
    matches = (re.fullmatch(r"G_(?:ema_)?((?:copy|best)\d+)\.pth", path.name) for path in folder.iterdir())
    suffixes = sorted({match[1] for match in matches if match})
    return f" There are copies; choose one with --suffix: {', '.join(suffixes)}." if suffixes else ""


def _read(path: Path) -> dict[str, Any]:
    refusal = UserError(f"{path} holds more than weights and settings; refused, because loading it could run code.")
    check_archive(path)
    try:
        with torch.serialization.safe_globals([(value, name) for name, value in _ALLOWED.items()]):
            content = plain(torch.load(path, map_location="cpu", weights_only=True))
    except PermissionError:
        raise
    except Exception as error:  # torch reports damage with many types: RuntimeError, EOFError, OSError, KeyError …
        reason = str(error).lower() if isinstance(error, pickle.UnpicklingError) else ""
        if "got module" in reason:
            content = _read_before_torch_1_6(path, refusal)
        elif "global" in reason:
            raise refusal from None
        else:
            raise damaged(path) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a dictionary, as these checkpoints do.")
    return content


def _read_before_torch_1_6(path: Path, refusal: UserError) -> Any:
    """The content of a file without tensors in the old format, whose references to modules `torch.load` never takes.

    Such a file is a row of pickles: a magic number, a version, facts about the machine, the content.
    """
    with open(path, "rb") as file:
        try:
            return plain([_PlainUnpickler(file).load() for _ in range(4)][-1])
        except Exception:  # a pickle can fail in any way
            raise refusal from None


class _PlainUnpickler(pickle._Unpickler):
    """Finds nothing but plain data, activations and numpy scalars; in Python, where a memo takes no memory ahead."""

    _classes = _ALLOWED | {
        "collections.OrderedDict": OrderedDict,
        "__builtin__.set": set,
    }

    def find_class(self, module: str, name: str) -> Any:
        return self._classes[f"{module}.{name}"]

    def persistent_load(self, reference: tuple) -> Any:
        kind, value, *_ = reference
        if kind != "module":
            raise pickle.UnpicklingError(f"unexpected {kind}")
        return value
