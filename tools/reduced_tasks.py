"""A small part of a task in a packed file of its own: fewer examples, drawn by a seed, cut to a length.

Whatever trains on the file has the same examples to learn from and is tested on the same ones. They are drawn from the
whole splits, for the files of some tasks have one class after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from hrrformer.data import open_task
from hrrformer.packed import write_packed
from hrrformer.tasks import get_task
from hrrformer.tasks.protocol import Example
from hrrformer.token_split import TokenSplit
from runtime.errors import UserError


def write_reduced(out: Path, task: str, data: str, length: int, sizes: Mapping[str, int], seed: int) -> None:
    """Writes `sizes[split]` examples of each split to `out`, which `hrrformer train --data` takes.

    Args:
        data: as `hrrformer.data.open_task` takes it.
        length: tokens kept of a sequence.

    Raises:
        UserError: a split has fewer examples, the task has pairs of sequences, or as `open_task`.
    """
    whole, first_id = open_task(task, data, length), get_task(task).first_id
    if whole.train.inputs != 1:
        raise UserError(f"{task} has {whole.train.inputs} sequences an example; tasks of one can be reduced.")
    generator = np.random.default_rng(seed)
    splits = {}
    for name, size in sizes.items():
        split = getattr(whole, name)
        if size > len(split):
            raise UserError(f"{whole.source} has {len(split):,} {name} examples, fewer than the {size:,} asked for.")
        splits[name] = _examples(split, generator.permutation(len(split))[:size], length, first_id)
    description = {
        "task": task,
        "max_length": length,
        "first_id": first_id,
        "class_names": whole.class_names,
        "source": f"{whole.source}, {', '.join(f'{size} {name}' for name, size in sizes.items())} drawn by seed {seed}",
        "fingerprint": f"{whole.train.fingerprint} {dict(sizes)} {seed}",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_packed(out, splits, description)


def _examples(split: TokenSplit, members: np.ndarray, length: int, first_id: int) -> Iterator[Example]:
    for member in members:
        tokens = split.rows([member], length)[0, : int(split.lengths[member, 0])]
        yield ((tokens - first_id).numpy().astype(np.uint8).tobytes(),), int(split.labels[member])
