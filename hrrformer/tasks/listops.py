"""ListOps: the value of nested list operations, a number from 0 to 9.

Source: Nangia & Bowman 2018, arXiv:1804.06028; lengths as in Tay et al. 2020, arXiv:2011.04006.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

from hrrformer.tasks.files import count_lines, lines, locate, stamp
from hrrformer.tasks.listops_trees import generate_trees, symbols
from hrrformer.tasks.listops_vocabulary import VOCABULARY, tokenise
from hrrformer.tasks.protocol import Example, Source, Task
from runtime.errors import UserError

FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
HEADER = "Source\tTarget"
CLASS_NAMES = tuple("0123456789")
GENERATED = {"train": 20_000, "validation": 2_000, "test": 2_000}
WHERE = (
    f"{', '.join(FILES.values())} (python -m tools.prepare_lra listops FOLDER makes them; or lra_release/listops-1000 "
    "of the Long Range Arena, github.com/google-research/long-range-arena)"
)


def _open(path: Path, max_length: int) -> Source:
    folder = locate(path, list(FILES.values()), ("listops-1000", "lra_release/listops-1000"), WHERE)
    files = {split: folder / name for split, name in FILES.items()}
    return Source(
        title=str(folder),
        stamp=stamp(files.values()),
        class_names=CLASS_NAMES,
        sizes={split: max(count_lines(file) - 1, 0) for split, file in files.items()},
        read=lambda split, workers: _read(files[split], max_length),
    )


def _read(file: Path, max_length: int) -> Iterator[Example]:
    rows = lines(file)
    if next(rows, (0, b""))[1] != HEADER.encode():
        raise UserError(f"{file}, line 1: expected the header Source, tab, Target")
    for number, row in rows:
        source, tab, target = row.partition(b"\t")
        if not tab or target not in [name.encode() for name in CLASS_NAMES] or not source.strip():
            raise UserError(f"{file}, line {number}: expected an expression, a tab and a digit, found {_short(row)}")
        try:
            tokens = tokenise(source)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
        yield (tokens[:max_length],), int(target)


def _generate(max_length: int, seed: int) -> Source:
    """Trees between a quarter of the length and the length, as 500 to 2000 in the benchmark."""

    @cache
    def splits(workers: int) -> dict[str, list[Example]]:
        trees = generate_trees(sum(GENERATED.values()), seed, max_length // 4, max_length, workers)
        return {
            split: [((symbols(codes),), value) for codes, value in islice(trees, size)]
            for split, size in GENERATED.items()
        }

    return Source(
        title=f"generated ListOps with fewer than {max_length} tokens",
        stamp=f"seed {seed}, {GENERATED}",
        class_names=CLASS_NAMES,
        sizes=dict(GENERATED),
        read=lambda split, workers: iter(splits(workers)[split]),
    )


def _short(row: bytes) -> str:
    return repr(row.decode("utf-8", "replace") if len(row) <= 60 else row[:50].decode("utf-8", "replace") + " ...")


LISTOPS = Task(
    name="listops",
    title="value of nested list operations",
    vocab_size=len(VOCABULARY),
    first_id=0,
    max_length=2000,
    class_names=CLASS_NAMES,
    uses_mask=True,
    where=WHERE,
    open=_open,
    generate=_generate,
)
