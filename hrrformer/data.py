"""`open_task`: the splits of a task, packed once from whatever files there are, then mapped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrrformer.packed import SUFFIX, PackedTask, read_packed, write_packed
from hrrformer.tasks import get_task
from hrrformer.tasks.protocol import Example, Source, Task
from hrrformer.token_split import TokenSplit
from runtime.errors import UserError
from runtime.hashing import hash64
from runtime.progress import track

GENERATED = ("", "generated")  # what --data says for a set made here
HELD_OUT = 0.1  # of the training examples, for each of validation and test that the source does not have
_SPLIT_STREAM = 0x5B11


@dataclass(frozen=True)
class TaskData:
    """A task with its splits; token ids lie in 0 .. vocab_size - 1."""

    name: str
    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit
    vocab_size: int
    max_length: int
    class_names: tuple[str, ...]
    source: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def open_task(
    task: str,
    data: str,
    max_length: int = 0,
    cache_dir: str | Path | None = None,
    seed: int = 0,
    *,
    validation_is_test: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> TaskData:
    """Opens a task's official files, a file of `tools.prepare_lra`, or a small set generated here.

    Files are read once and packed into the cache, under a name that changes with the files, the length and the reader.
    A source without a validation or test split gets one: a tenth of its training examples each, drawn by `seed`.
    Runs that are to be compared must therefore agree in it.

    Args:
        task: one of `hrrformer.tasks.TASKS`.
        data: the path; "generated" or "" for a small set made here (listops, image).
        max_length: tokens kept of a sequence; 0 is the task's own. In image tasks it is the number of pixels.
        cache_dir: default `$XDG_CACHE_HOME/hrrformer` or `~/.cache/hrrformer`.
        seed: of the held-out examples, and of generated sets.
        validation_is_test: as the original does for text and image: nothing is held out of the training examples, and
            a checkpoint chosen by validation has seen the test labels.
        workers: processes that decode and generate; default one a core.
        progress: report on stderr.

    Raises:
        UserError: an unknown task; missing, damaged or unexpected files (the message says which and where to get
            them); a packed file of another task or length.
    """
    chosen = get_task(task)
    max_length = max_length or chosen.max_length
    path = Path(data).expanduser()
    if data not in GENERATED and path.suffix == SUFFIX:
        packed = read_packed(path)
        _check_packed(packed, chosen, max_length, path)
    else:
        source = open_source(chosen, data, max_length, seed)
        folder = Path(cache_dir) if cache_dir else _default_cache()
        cached = folder / f"{chosen.name}-{_fingerprint(chosen, source, max_length)}{SUFFIX}"
        if not cached.exists():
            pack(cached, chosen, source, max_length, workers, progress)
        packed = read_packed(cached)
    return _with_splits(chosen, packed, max_length, seed, validation_is_test)


def open_source(task: Task, data: str, max_length: int, seed: int) -> Source:
    """The official files at a path, or a generated set.

    Raises:
        UserError: no path for a task that cannot be generated, nothing there, or as the task's reader.
    """
    if data in GENERATED:
        if task.generate is None:
            raise UserError(f"{task.name} needs its files (--data PATH): {task.where}")
        return task.generate(max_length, seed)
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist. {task.name} reads {task.where}")
    return task.open(path, max_length)


def pack(path: Path, task: Task, source: Source, max_length: int, workers: int | None, progress: bool) -> None:
    """Reads a source and writes it as a packed file.

    Raises:
        UserError: as the task's reader; a split without examples, or a class without any to learn from.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    workers = workers or os.cpu_count() or 1
    splits = {
        split: _not_empty(
            track(source.read(split, workers), size, f"{task.name}: packing {split}", progress), source, split
        )
        for split, size in source.sizes.items()
    }
    description = {
        "task": task.name,
        "max_length": max_length,
        "first_id": task.first_id,
        "class_names": source.class_names,
        "source": source.title,
        "fingerprint": _fingerprint(task, source, max_length),
    }
    write_packed(path, splits, description)


def _not_empty(examples: Iterable[Example], source: Source, split: str) -> Iterator[Example]:
    """Passes examples on; at the end, complains where there were none, or none of some class to learn."""
    found = [0] * len(source.class_names)
    for inputs, label in examples:
        found[label] += 1
        yield inputs, label
    if not any(found):
        raise UserError(f"{source.title}: no examples in the {split} split")
    if split == "train" and 0 in found:
        empty = ", ".join(name for name, count in zip(source.class_names, found, strict=True) if count == 0)
        raise UserError(f"{source.title}: no example of class {empty} in the {split} split")


def _with_splits(task: Task, packed: PackedTask, max_length: int, seed: int, validation_is_test: bool) -> TaskData:
    pools = packed.splits
    members = {split: np.arange(len(pool.labels)) for split, pool in pools.items()}
    origin = {split: split for split in pools}
    missing = [split for split in ("test", "validation") if split not in pools]
    if validation_is_test and "validation" in missing:
        missing.remove("validation")
    shuffled = np.argsort(hash64(seed, _SPLIT_STREAM, members["train"]), kind="stable")
    count = int(HELD_OUT * len(shuffled))
    if missing and count == 0:
        raise UserError(f"{packed.source} has {len(shuffled)} examples, too few to hold some out for {missing[-1]}")
    for place, split in enumerate(missing):
        members[split], origin[split] = np.sort(shuffled[place * count : (place + 1) * count]), "train"
    members["train"] = np.sort(shuffled[len(missing) * count :])
    if "validation" not in members:
        members["validation"], origin["validation"] = members["test"], origin["test"]

    def split(name: str) -> TokenSplit:
        identity = hashlib.sha256(f"{packed.fingerprint} {origin[name]} {max_length}".encode())
        identity.update(members[name].tobytes())
        return TokenSplit(
            pools[origin[name]],
            members[name],
            first_id=packed.first_id,
            max_length=max_length,
            class_names=packed.class_names,
            fingerprint=identity.hexdigest()[:32],
        )

    return TaskData(
        name=task.name,
        train=split("train"),
        validation=split("validation"),
        test=split("test"),
        vocab_size=task.vocab_size,
        max_length=max_length,
        class_names=packed.class_names,
        source=packed.source,
    )


def _check_packed(packed: PackedTask, task: Task, max_length: int, path: Path) -> None:
    if packed.task != task.name:
        raise UserError(f"{path} holds the task {packed.task}, not {task.name}")
    if packed.max_length < max_length or (packed.max_length != max_length and not task.uses_mask):
        raise UserError(
            f"{path} holds sequences of {packed.max_length} tokens, not {max_length}: pack the originals again"
        )

    wrong_inputs = any(pool.lengths.shape[1] != task.inputs for pool in packed.splits.values())
    largest = task.vocab_size - 1 - task.first_id
    unknown_symbols = largest < 255 and any(pool.symbols.max(initial=0) > largest for pool in packed.splits.values())
    if packed.first_id != task.first_id or wrong_inputs or unknown_symbols:
        raise UserError(f"{path} is damaged: it holds tokens that the task {task.name} does not have")


def _fingerprint(task: Task, source: Source, max_length: int) -> str:
    text = repr((task.name, task.version, max_length, source.class_names, source.stamp))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hrrformer"
