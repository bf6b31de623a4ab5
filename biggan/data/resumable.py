"""Packing that goes on where it was killed, and ends with the bytes that an unbroken one would have written.

Beside the file NAME there are, until it is whole, `.NAME.partial`, which has the images so far at their places, and
`.NAME.journal`, a line of JSON a commit. The first line says what is packed: the listing of the source (names, sizes
and times of files, labels), size, resize rule, and Pillow's version, for decoders differ in the last bit. Where another
source or size is to be packed that line differs, and packing starts anew. Every further line has the labels and the
damaged records since the line before, and the CRC-32 of all image bytes so far.

A commit flushes the images to the disk before its line. So whatever the moment of a kill or a power cut, what whole
lines speak of is there, and the rest is written again. The next record is the number of images and damaged records in
the lines.

The journal is locked while it is in use: a second process that packs to the same name is refused.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL

from biggan.data.decoding import MAX_DAMAGED_FRACTION, Damaged, TooManyDamaged, decoded
from biggan.data.loading import dataset_fingerprint
from biggan.data.packed import PackedWriter, describe
from biggan.data.records import ImageSource
from runtime.errors import RunError, UserError
from runtime.progress import track

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_SECONDS_BETWEEN_COMMITS = 2.0
_READ_BYTES = 1 << 24


@dataclass
class Packing:
    """What was packed: a label for each image written, and the damaged records."""

    labels: list[int] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    crc: int = 0
    continued_from: int = 0  # records that an earlier, interrupted packing had done

    @property
    def records(self) -> int:
        return len(self.labels) + len(self.damaged)


def pack(
    path: Path,
    source: ImageSource,
    resolution: int,
    workers: int | None = None,
    progress: bool = True,
    max_damaged_fraction: float = MAX_DAMAGED_FRACTION,
) -> Packing:
    """Decodes a source into a packed file; arguments as of `open_images`.

    Before the file appears under its name it is read again, and every record of the source is in it or was damaged.

    Raises:
        UserError: too many damaged images, not enough space, or another process that packs to the same name.
        RunError: a file that is not read as it was written, or a source that changed its length.
        OSError: the folder or disk refuses the file. The same command goes on.
    """
    partial, journal = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "journal"))
    metadata = describe(source.class_names, source.title, dataset_fingerprint(source, resolution))
    what = {"pillow": PIL.__version__, "capacity": len(source), "resolution": resolution, **metadata}
    with _locked(journal) as lines, partial.open("r+b" if partial.exists() else "w+b") as file:
        done = _restore(lines, what)
        try:
            writer = PackedWriter(file, path.parent, len(source), resolution, metadata, done.labels)
            if _crc(file, writer.begin, writer.end, progress) != done.crc:
                done = _restart(lines, what)
                writer = PackedWriter(file, path.parent, len(source), resolution, metadata)
            if done.records and progress:
                print(f"going on after {done.records:,} of {len(source):,} records", file=sys.stderr)
            damaged = Damaged(source, max_damaged_fraction, done.damaged)
            images = decoded(source, resolution, workers, progress, damaged, first=done.records)
            _write(images, writer, done, damaged, file, lines)
        except BaseException as error:
            if isinstance(error, TooManyDamaged) or not done.records:  # to go on would end so too, or gain nothing
                partial.unlink()
                journal.unlink()
            raise
        if done.records != len(source):
            raise RunError(f"{source.title} has {done.records:,} records where it had {len(source):,} at the beginning")
        writer.finish()
        labels = np.array(done.labels, dtype="<i8").tobytes()
        if _crc(file, writer.begin, writer.end, progress) != done.crc or file.read(len(labels) + 1) != labels:
            _restart(lines, what)
            raise RunError(f"{partial} is not read as it was written: check the disk and its space")
        os.replace(partial, path)
        journal.unlink()
    return done


def _write(
    images: Iterator[tuple[np.ndarray, int]],
    writer: PackedWriter,
    done: Packing,
    damaged: Damaged,
    file: BinaryIO,
    lines: BinaryIO,
) -> None:
    """Writes all images, and commits them every few seconds and at the end."""
    crc = done.crc

    def commit() -> None:
        file.flush()
        os.fsync(file.fileno())
        labels, names = writer.labels[len(done.labels) :], damaged.found[len(done.damaged) :]
        _append(lines, {"labels": labels, "damaged": names, "crc": crc})
        done.labels += labels
        done.damaged += names
        done.crc = crc

    committed = time.monotonic()
    for image, label in images:
        writer.add(image, label)
        crc = zlib.crc32(image, crc)
        if time.monotonic() - committed >= _SECONDS_BETWEEN_COMMITS:
            commit()
            committed = time.monotonic()
    commit()


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The journal, open to read and append, for this process alone.

    Raises:
        UserError: another process has it.
    """
    while True:
        with path.open("a+b") as file:
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is writing {path.with_name(path.name[1:]).with_suffix('')}") from None
            except OSError:  # a file system without locks
                pass
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return
            # The process that had the lock has ended meanwhile, and removed this file.


def _restore(lines: BinaryIO, what: dict[str, Any]) -> Packing:
    """What whole lines say, after which the journal ends; or a new beginning, where they are of another packing."""
    lines.seek(0)
    done, end = Packing(), 0
    for line in lines:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None  # None: killed while it wrote this line
            if end == 0 and entry != what:
                print("starting anew: what an interrupted run left is of another source or size", file=sys.stderr)
                break
            if end > 0:
                labels, damaged, done.crc = entry["labels"], entry["damaged"], entry["crc"]
                done.labels += labels
                done.damaged += damaged
        except (ValueError, KeyError, TypeError):
            break
        end += len(line)
    if end == 0:
        return _restart(lines, what)
    lines.truncate(end)
    done.continued_from = done.records
    return done


def _restart(lines: BinaryIO, what: dict[str, Any]) -> Packing:
    lines.truncate(0)
    _append(lines, what)
    return Packing()


def _append(lines: BinaryIO, entry: dict[str, Any]) -> None:
    lines.write(json.dumps(entry).encode() + b"\n")
    lines.flush()
    os.fsync(lines.fileno())


def _crc(file: BinaryIO, begin: int, end: int, progress: bool) -> int:
    """CRC-32 of these bytes, after which the file stands at `end`."""
    file.seek(begin)
    crc = 0
    steps = range(begin, end, _READ_BYTES)
    for start in track(steps, len(steps), f"checking {file.name}", progress):
        crc = zlib.crc32(file.read(min(_READ_BYTES, end - start)), crc)
    return crc
