"""The packed file of a task: all its sequences, one byte a token, in one safetensors file that is mapped, not loaded.

Tensors for each split S: `S.symbols` uint8, the sequences one after another and up to 7 bytes of filling; `S.lengths`
int64 (N, inputs); `S.labels` int64 (N,). Metadata: `format`, `task`, `max_length`, `first_id`, `class_names` (JSON),
`source`, `fingerprint`. Any program that knows safetensors reads it.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from hrrformer.tasks.protocol import Example
from runtime.errors import UserError

SUFFIX = ".safetensors"
_FORMAT = "hrrformer-tokens-1"
_HEADER_BYTES = 1 << 14  # room left at the front for the header, which is known when all is written


@dataclass(frozen=True)
class PackedSplit:
    """symbols uint8 (at least the sum of lengths,), mapped; lengths int64 (N, inputs); labels int64 (N,)."""

    symbols: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class PackedTask:
    """A packed file, mapped."""

    task: str
    max_length: int
    first_id: int
    class_names: tuple[str, ...]
    source: str
    fingerprint: str
    splits: dict[str, PackedSplit]


def write_packed(path: Path, splits: dict[str, Iterable[Example]], description: dict[str, str | int | tuple]) -> None:
    """Writes examples as they come, without holding them; the file appears under its name only when it is whole.

    Args:
        splits: {split: examples}, read one after another.
        description: the fields of PackedTask but `splits`.

    Raises:
        OSError: the folder or disk refuses the file.
    """
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}
    header: dict[str, dict] = {"__metadata__": {"format": _FORMAT, **metadata}}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    try:
        with temporary.open("wb") as file:
            file.seek(8 + _HEADER_BYTES)
            end = 0
            for split, examples in splits.items():
                lengths: list[list[int]] = []
                labels: list[int] = []
                start = end
                for inputs, label in examples:
                    file.writelines(inputs)
                    lengths.append([len(symbols) for symbols in inputs])
                    labels.append(label)
                    end += sum(lengths[-1])
                filling = -end % 8  # what follows is mapped as int64
                file.write(bytes(filling))
                end += filling
                header[f"{split}.symbols"] = _entry("U8", [end - start], start, end)
                for name, values in (("lengths", lengths), ("labels", labels)):
                    array = np.array(values, dtype="<i8")
                    file.write(array.tobytes())
                    header[f"{split}.{name}"] = _entry("I64", list(array.shape), end, end + array.nbytes)
                    end += array.nbytes
            text = json.dumps(header).encode()
            if len(text) > _HEADER_BYTES:
                raise UserError(f"{len(description['class_names']):,} class names are too many for one task")
            file.seek(0)
            file.write(struct.pack("<Q", _HEADER_BYTES) + text.ljust(_HEADER_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_packed(path: Path) -> PackedTask:
    """Maps a packed file; sequences are read from disk when they are first used.

    Raises:
        UserError: cut short, or not of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{path} holds no sequences: it was not written by tools.prepare_lra")
            splits = {
                split: PackedSplit(
                    *(file.get_tensor(f"{split}.{name}").numpy() for name in ("symbols", "lengths", "labels"))
                )
                for split in sorted({key.split(".")[0] for key in file.keys()})  # noqa: SIM118 (no mapping)
            }
            class_names = tuple(json.loads(metadata["class_names"]))
            _check(splits, len(class_names))
            return PackedTask(
                task=metadata["task"],
                max_length=int(metadata["max_length"]),
                first_id=int(metadata["first_id"]),
                class_names=class_names,
                source=metadata["source"],
                fingerprint=metadata["fingerprint"],
                splits=splits,
            )
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (UserError, OSError):
        raise
    except Exception as error:  # SafetensorError, KeyError, and what numpy and JSON raise on values that no file has
        raise UserError(f"{path} is damaged or cut short: {error}") from None


def _check(splits: dict[str, PackedSplit], num_classes: int) -> None:
    if "train" not in splits:
        raise ValueError("it has no training examples")
    for name, split in splits.items():
        arrays = (split.symbols, split.lengths, split.labels)
        if [(array.dtype, array.ndim) for array in arrays] != [(np.uint8, 1), (np.int64, 2), (np.int64, 1)]:
            raise ValueError(f"its {name} split has arrays of other kinds")
        if (
            len(split.lengths) != len(split.labels)
            or split.lengths.min() < 0
            or split.lengths.max() > len(split.symbols)  # before their sum, which could wrap around
            or split.lengths.sum() > len(split.symbols)
        ):
            raise ValueError(f"the lengths in its {name} split do not fit the sequences")
        if split.labels.min() < 0 or split.labels.max() >= num_classes:
            raise ValueError(f"labels in its {name} split have no class")


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
