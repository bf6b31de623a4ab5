"""Images in Parquet files as the Hugging Face hub stores them.

A column `image` or `img` (or one that the hub's description calls an Image) has the bytes of image files, in a struct
{bytes, path} or as they are; a column `label` or `labels` (or the only ClassLabel), where there is one, whole numbers.
Names of classes come from the schema's metadata under `huggingface`.

Source: https://huggingface.co/docs/datasets/image_dataset, and `datasets.Features.arrow_schema`.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from biggan.data.decode import DamagedImage, check_file_size, open_image
from biggan.data.extras import optional_package
from biggan.data.labels import checked_labels, no_labels
from biggan.data.records import IndexedSource, file_stamp
from runtime.errors import UserError, of_the_system
from runtime.progress import track

SUFFIX = ".parquet"
_IMAGES, _LABELS = ("image", "img"), ("label", "labels")
_SPLIT = re.compile(r"(train|test|valid|validation|val|dev)\b(?=-)")  # of train-00000-of-00005.parquet
_MAX_GROUP_BYTES = 1 << 30
_CACHED_BYTES = 512 << 20


def shards_of_split(path: Path) -> list[Path]:
    """The files of `folder/train`, where the folder has train-00000-of-00005.parquet and so on."""
    return [shard for shard in sorted(path.parent.glob(f"*{SUFFIX}")) if _split(shard) == path.name]


def parquet_source(path: Path, shards: list[Path] | None = None, progress: bool = True) -> IndexedSource:
    """Opens a Parquet file, or the shards of a folder in the order of their names, and reads labels and positions.

    Images are read by row groups, one after the other under a lock: the smallest piece that Parquet reads. The last few
    are kept, because threads decode neighbouring rows.

    Raises:
        UserError: pyarrow is missing, a damaged file, no column of images, labels that are no classes, shards of
            several splits or with different columns, or row groups too large for the memory.
    """
    arrow = optional_package("pyarrow.parquet", "parquet", f"reading {path}")
    shards = shards or (sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path])
    splits = sorted({split for shard in shards if (split := _split(shard))})
    if path.is_dir() and len(splits) > 1:
        raise UserError(f"{path} holds the splits {', '.join(splits)}: choose one, as in {path}/{splits[-1]}")
    files = [_Shard(arrow, shard) for shard in track(shards, len(shards), f"listing {path}", progress)]
    first = files[0]
    for file in files:
        if file.columns != first.columns:
            raise UserError(f"{file.path} has other columns or classes than {first.path}")
    rows = [count for file in files for count in file.rows]
    places = [(file, group) for file in files for group in range(len(file.rows))]
    starts = np.array([0, *accumulate(rows)])  # (G + 1,) of the groups of all shards
    shard_starts = np.array([0, *accumulate(sum(file.rows) for file in files)])
    if starts[-1] == 0:
        raise UserError(f"no images in {path}: it has no rows")
    if first.label is None:
        labels, class_names = no_labels(starts[-1])
    else:
        values = np.concatenate([file.labels for file in files])
        labels, class_names = checked_labels(values, f"column {first.label!r} of {path}", first.class_names)
    groups = _RowGroups(places)

    def name(index: int) -> str:
        shard, row = _place(shard_starts, index)
        return f"{files[shard].path.name} row {row}"

    def read(index: int) -> Image.Image:
        group, row = _place(starts, index)
        value = groups.column(group)[row]
        value = value["bytes"] if first.in_struct and value.is_valid else value
        if not value.is_valid:
            raise DamagedImage("a row without the bytes of an image")
        check_file_size(value.as_buffer().size)
        return open_image(value.as_py())

    stamp = [[file.path.name, file_stamp(file.path), file.rows, file.image] for file in files]
    return IndexedSource(str(path), labels, class_names, stamp, name, read)


def _place(starts: np.ndarray, index: int) -> tuple[int, int]:
    """Which part holds a row of the whole, and which of its rows that is."""
    part = int(np.searchsorted(starts, index, side="right")) - 1
    return part, index - int(starts[part])


class _Shard:
    """One file: which columns are what, its labels, and the rows of its groups."""

    def __init__(self, arrow: Any, path: Path):
        self.path = path
        try:
            with arrow.ParquetFile(path) as file:
                self.metadata, schema = file.metadata, file.schema_arrow
                features = _features(schema.metadata or {})
                self.image, self.in_struct = _image_column(schema, features, path)
                self.label, self.class_names = _label_column(schema, features, path)
                self.columns = (self.image, self.in_struct, self.label, self.class_names)
                self.rows = [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]
                self._refuse_absurd_sizes()
                if self.label:
                    column = file.read(columns=[self.label])[self.label]
                    if column.null_count or len(column) != sum(self.rows):
                        raise UserError(f"column {self.label!r} of {path} has no label for some of its rows")
                    self.labels = column.to_numpy()
            self._arrow = arrow
        except UserError:
            raise
        except Exception as error:  # ArrowInvalid, OSError, and what Thrift's reader raises
            if of_the_system(error):
                raise
            raise UserError(f"{path} is damaged, cut short or no Parquet file: {_line(error)}") from None

    def _refuse_absurd_sizes(self) -> None:
        size = self.path.stat().st_size
        if min(self.rows, default=0) < 0 or sum(self.rows) > size:
            raise UserError(f"{self.path} claims {sum(self.rows):,} rows, which its {size:,} bytes cannot hold")
        # Of whole groups: asked for a column of a damaged file, pyarrow 26 ends the process (a C++ exception that it
        # does not catch).
        largest = max((self.metadata.row_group(group).total_byte_size for group in range(len(self.rows))), default=0)
        if largest > _MAX_GROUP_BYTES:
            raise UserError(
                f"{self.path} has row groups of {largest / 2**30:.1f} GiB, which are read whole: write it again with "
                "row_group_size=100"
            )

    def read(self, group: int) -> Any:
        """The column of images of a row group, as one array."""
        try:
            with self._arrow.ParquetFile(self.path, metadata=self.metadata) as file:
                column = file.read_row_group(group, columns=[self.image])[self.image].combine_chunks()
        except Exception as error:  # as above
            raise DamagedImage(_line(error)) from None
        if len(column) != self.rows[group]:
            raise DamagedImage(f"{len(column):,} rows where there should be {self.rows[group]:,}")
        return column


class _RowGroups:
    """The row groups read last, for all threads."""

    def __init__(self, places: list[tuple[_Shard, int]]):
        self._places = places
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()

    def column(self, group: int) -> Any:
        """Raises DamagedImage where the group cannot be read."""
        with self._lock:
            if group not in self._kept:
                shard, number = self._places[group]
                try:
                    self._kept[group] = shard.read(number)
                except DamagedImage as error:  # kept too: reading it again for each row would take for ever
                    self._kept[group] = error
                while len(self._kept) > 4 and sum(map(_nbytes, self._kept.values())) > _CACHED_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            column = self._kept[group]
        if isinstance(column, DamagedImage):
            raise DamagedImage(str(column))
        return column


def _nbytes(column: Any) -> int:
    return getattr(column, "nbytes", 0)


def _features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """What the hub says of the columns, by name; nothing where it does not, or unreadably."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _image_column(schema: Any, features: dict[str, Any], path: Path) -> tuple[str, bool]:
    """Its name, and whether the bytes are in a struct."""
    named = [name for name in (*_IMAGES, *_of_type(features, "Image")) if name in schema.names]
    if not named:
        raise UserError(f"{path} has no column {' or '.join(_IMAGES)}; its columns are {', '.join(schema.names)}")
    kind = schema.field(named[0]).type
    in_struct = str(kind).startswith("struct<") and kind.get_field_index("bytes") >= 0
    if str(kind.field("bytes").type if in_struct else kind) not in ("binary", "large_binary"):
        raise UserError(f"column {named[0]!r} of {path} must be binary or a struct {{bytes, path}}, not {kind}")
    return named[0], in_struct


def _label_column(schema: Any, features: dict[str, Any], path: Path) -> tuple[str | None, list[str] | None]:
    """Its name and the names of the classes, where there are such."""
    described = _of_type(features, "ClassLabel")
    named = [name for name in (*_LABELS, *(described if len(described) == 1 else [])) if name in schema.names]
    if not named:
        return None, None
    kind = schema.field(named[0]).type
    if "int" not in str(kind) or not str(kind).strip("uint").isdigit():
        raise UserError(f"column {named[0]!r} of {path} must hold whole numbers, not {kind}")
    names = features.get(named[0], {}).get("names")
    return named[0], list(map(str, names)) if isinstance(names, list) and names else None


def _of_type(features: dict[str, Any], kind: str) -> list[str]:
    return [name for name, feature in features.items() if feature.get("_type") == kind]


def _split(shard: Path) -> str | None:
    match = _SPLIT.match(shard.name)
    return match[1] if match else None


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
