"""Retrieval: whether one of two papers cites the other, read byte by byte.

Source: the ACL Anthology Network, Radev et al. 2013; as a byte task, Tay et al. 2020, arXiv:2011.04006.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hrrformer.tasks.files import count_lines, lines, locate, stamp
from hrrformer.tasks.protocol import Example, Source, Task
from runtime.errors import UserError

FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
CLASS_NAMES = ("unrelated", "cites")
COLUMNS = "label, id1, id2, text1, text2"
WHERE = (
    f"{', '.join(FILES.values())} (lra_release/tsv_data of the Long Range Arena, "
    "github.com/google-research/long-range-arena)"
)


def _open(path: Path, max_length: int) -> Source:
    folder = locate(path, list(FILES.values()), ("tsv_data", "lra_release/tsv_data"), WHERE)
    files = {split: folder / name for split, name in FILES.items()}
    return Source(
        title=str(folder),
        stamp=stamp(files.values()),
        class_names=CLASS_NAMES,
        sizes={split: count_lines(file) for split, file in files.items()},
        read=lambda split, workers: _read(files[split], max_length),
    )


def _read(file: Path, max_length: int) -> Iterator[Example]:
    """Rows without header or quoting: label (0.0 or 1.0), id1, id2, text1, text2, parted by tabs."""
    for number, row in lines(file):
        columns = row.split(b"\t")
        if len(columns) != 5:
            raise UserError(
                f"{file}, line {number}: found {len(columns)} columns parted by tabs, expected 5: {COLUMNS}"
            )
        try:
            label = {0.0: 0, 1.0: 1}[float(columns[0])]
        except (ValueError, KeyError):
            found = columns[0][:20].decode("utf-8", "replace")
            raise UserError(f"{file}, line {number}: the label must be 0.0 or 1.0, found {found!r}") from None
        yield (columns[3][:max_length], columns[4][:max_length]), label


RETRIEVAL = Task(
    name="retrieval",
    title="citation between two papers, byte by byte",
    vocab_size=257,
    first_id=1,
    max_length=4000,
    class_names=CLASS_NAMES,
    uses_mask=True,
    where=WHERE,
    open=_open,
    inputs=2,
)
