"""Files of torch.save, read without running what is in them and in no more memory than they have bytes.

`weights_only` lets a pickle name nothing that could run a program. It does not keep a file from making torch 2.9 read
(or, where it claims another byte order, write) behind the end of a member, whose length torch takes from the pickle: so
the pickle is read before, for these lengths alone. Nor does it keep a small file from asking for much memory, by
compressed members, by tensors that repeat a few numbers, or by lists that hold each other many times.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.errors import UserError, of_the_system

_ITEM_BYTES = {
    **dict.fromkeys(("Untyped", "Bool", "Byte", "Char"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
MAX_VALUES = 1 << 20  # of a file, tensors counted as one: the checkpoint of a large network has some ten thousand


def read_torch_file(path: Path) -> Any:
    """The content of a file, in torch's format of today or of before 1.6; tensors are on the CPU, without gradients.

    Raises:
        UserError: the file is damaged, holds code, is a TorchScript program, or asks for more memory than its size.
        OSError: it cannot be read.
    """
    check_archive(path)
    try:
        with warnings.catch_warnings():  # torch warns of other programs' pickles before it refuses them
            warnings.simplefilter("ignore")
            return plain(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch reports damage with many types: RuntimeError, EOFError, struct.error …
        out_of_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if of_the_system(error) or out_of_memory and is_archive(path):  # whose lengths are those that it claims
            raise
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise UserError(
                f"{path} is refused: it holds more than weights, and loading that could run code."
            ) from None
        raise damaged(path) from None


def damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged or is not a checkpoint.")


def check_archive(path: Path) -> None:
    """Files of before torch 1.6 are no archives and pass.

    Raises:
        UserError: it is a TorchScript program, or is no archive as torch.save writes it: nothing compressed, no name
            twice, every member with its checksum, every tensor as long as its member.
    """
    if not is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            stored = all(m.compress_type == zipfile.ZIP_STORED and m.compress_size == m.file_size for m in members)
            names = {member.filename.lower() for member in members}  # torch looks for them in any case
            sound = stored and len(names) == len(members) and archive.testzip() is None
            script = any(name.endswith("/constants.pkl") or "/code/" in name for name in names)
            if sound and not script:
                _Lengths(archive).load()
    except Exception as error:  # not only BadZipFile: broken directories also give struct.error, ValueError, ...
        if of_the_system(error):
            raise
        raise damaged(path) from None
    if script:
        raise UserError(f"{path} is a TorchScript program, which is not run: give a file of weights (a state_dict).")
    if not sound or sum(m.file_size for m in members) > path.stat().st_size:
        raise damaged(path)


class _Lengths(pickle._Unpickler):
    """Builds nothing, and compares the length of each tensor's memory with that of its member.

    In Python, as torch's own: the unpickler in C fills as much memory as the number of a memo says.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.sizes = {member.filename: member.file_size for member in archive.infolist()}
        self.root = next(iter(self.sizes)).partition("/")[0]
        super().__init__(io.BytesIO(archive.read(f"{self.root}/data.pkl")), encoding="utf-8")

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Nothing,), {})

    def persistent_load(self, reference: Any) -> None:
        _, kind, key, _, length = reference
        if length * _ITEM_BYTES[kind.__name__.removesuffix("Storage")] != self.sizes[f"{self.root}/data/{key}"]:
            raise ValueError(f"tensor {key} is not as long as it says")


class _Nothing:
    """Stands for whatever a pickle names, and takes whatever it does with it."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...


def is_archive(path: Path) -> bool:
    """Whether a file begins as those do that torch has written since 1.6."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def plain(content: Any) -> Any:
    """The tree with detached tensors.

    Raises:
        ValueError: a tensor is larger than its memory, or there are more values than any checkpoint has.
    """
    for count, node in enumerate(_walk(content)):
        if count == MAX_VALUES:
            raise ValueError("too many values")
        if isinstance(node, Tensor) and node.numel() * node.element_size() > node.untyped_storage().nbytes():
            raise ValueError("a tensor that repeats its numbers")
    return _detached(content)


def _walk(root: Any) -> Iterator[Any]:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, dict):
            waiting.extend(node.values())
        elif isinstance(node, list | tuple):
            waiting.extend(node)


def _detached(node: Any) -> Any:
    if isinstance(node, Tensor):
        return node.detach()
    if type(node) in (list, tuple):
        return type(node)(map(_detached, node))
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = _detached(value)
    return node
