"""Makes the data sets of the Long Range Arena that can be generated, or packs official files into one file.

python -m tools.prepare_lra listops lra/listops                                  the files basic_{train,val,test}.tsv
python -m tools.prepare_lra pathfinder lra/pathfinder32 --count 200000           the folder curv_contour_length_14
python -m tools.prepare_lra pathx lra/pathfinder128                              the same at 128 x 128
python -m tools.prepare_lra text imdb.safetensors --data aclImdb_v1.tar.gz       one file for hrrformer train --data
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import Image

from hrrformer.data import open_source, pack
from hrrformer.packed import SUFFIX, read_packed
from hrrformer.tasks import TASKS, get_task
from hrrformer.tasks.listops import FILES, HEADER
from hrrformer.tasks.listops_trees import generate_trees, text
from hrrformer.tasks.parallel import ordered_map
from hrrformer.tasks.pathfinder_pictures import VERSION, draw_picture
from hrrformer.tasks.pathfinder_settings import SETS, Settings, get_settings
from runtime.cli import CommandParser, run_command
from runtime.errors import UserError
from runtime.progress import track

LISTOPS_COUNT = (96_000, 2_000, 2_000)
PATHFINDER_COUNT = (200_000,)
IMAGES_PER_FOLDER = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Raises:
        UserError: a task that cannot be generated without --data, counts that make no sense, an output that is
            already there, and what the task's reader raises.
    """
    parser = CommandParser(
        prog="python -m tools.prepare_lra",
        description="Generate ListOps or Pathfinder with the published procedure, or pack a task's files (--data).",
    )
    parser.add_argument("task", help=f"one of {', '.join(TASKS)}")
    parser.add_argument("out", type=Path, help=f"folder to write to; with --data, a file whose name ends in {SUFFIX}")
    parser.add_argument("--data", help="official files of the task, to be packed; nothing is generated")
    parser.add_argument(
        "--count",
        type=int,
        nargs="+",
        help=f"listops: training, validation and test examples (None: {' '.join(map(str, LISTOPS_COUNT))}); "
        f"pathfinder: images (None: {PATHFINDER_COUNT[0]})",
    )
    parser.add_argument("--seed", type=int, default=0, help="names the examples; the same ones whatever --workers is")
    parser.add_argument("--workers", type=int, help="processes; None is one a core")
    parser.add_argument("--resolution", type=int, default=32, help="pathfinder: 32, 64, 128 or 256; pathx is 128")
    parser.add_argument("--contour-length", type=int, default=14, help="pathfinder: 6, 9 or 14, the benchmark's")
    parser.add_argument("--min-length", type=int, default=500, help="listops: examples have more tokens than this")
    parser.add_argument("--max-length", type=int, help="listops: fewer than this (None: 2000); --data: tokens kept")
    options = parser.parse_args(argv)
    task = get_task(options.task)
    workers = options.workers if options.workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")

    if options.data is not None:
        _pack(options.out, task.name, options.data, options.max_length or task.max_length, workers)
    elif task.name == "listops":
        counts = _counts(options.count, LISTOPS_COUNT, "training, validation and test examples")
        write_listops(options.out, counts, options.seed, options.min_length, options.max_length or 2000, workers)
    elif task.name in ("pathfinder", "pathx"):
        (count,) = _counts(options.count, PATHFINDER_COUNT, "images")
        side = 128 if task.name == "pathx" else options.resolution
        write_pathfinder(options.out, get_settings(side, options.contour_length), count, options.seed, workers)
    else:
        raise UserError(f"{task.name} cannot be generated; --data PATH packs its files: {task.where}")
    return 0


def write_listops(
    folder: Path, counts: Sequence[int], seed: int, min_length: int, max_length: int, workers: int
) -> None:
    """The files of the release: a header, then rows of an expression and its value. They appear when all are whole.

    Raises:
        UserError: a file is there already, or no trees have such lengths.
    """
    files = [folder / name for name in FILES.values()]
    _refuse_existing(files)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = [file.with_name(f".{file.name}.{os.getpid()}.writing") for file in files]
    trees = generate_trees(sum(counts), seed, min_length, max_length, workers)
    trees = iter(track(trees, sum(counts), "generating ListOps"))
    with ExitStack() as cleanup:
        for file, count in zip(unfinished, counts, strict=True):
            cleanup.callback(file.unlink, missing_ok=True)
            with file.open("w", encoding="ascii") as opened:
                opened.write(HEADER + "\n")
                opened.writelines(f"{text(codes)}\t{value}\n" for codes, value in islice(trees, count))
        for temporary, file in zip(unfinished, files, strict=True):
            os.replace(temporary, file)
    print(f"{folder}: {', '.join(f'{n:,}' for n in counts)} examples\ntrain with: --task listops --data {folder}")


def write_pathfinder(out: Path, settings: Settings, count: int, seed: int, workers: int) -> None:
    """The layout of the release: imgs/N/sample_I.png and metadata/N.npy, text in spite of its name.

    Continues where an interrupted run with the same settings ended: a folder is done when its metadata are there.

    Raises:
        UserError: the folder holds something else.
    """
    folder = out / SETS[settings.contour_length]
    identity = {"program": VERSION, "seed": seed, "count": count} | json.loads(json.dumps(asdict(settings)))
    _begin(folder, identity)
    starts = [start for start in range(0, count, IMAGES_PER_FOLDER) if not _table(folder, start).exists()]
    parts = [range(start, min(start + IMAGES_PER_FOLDER, count)) for start in starts]
    for part in parts:
        (folder / "imgs" / str(part.start // IMAGES_PER_FOLDER)).mkdir(parents=True, exist_ok=True)
    rows = ordered_map(
        partial(_write_picture, folder, settings, seed), (i for part in parts for i in part), workers, chunk=16
    )
    rows = iter(track(rows, sum(map(len, parts)), f"drawing Pathfinder {settings.side} x {settings.side}"))
    for part in parts:
        table = _table(folder, part.start)
        temporary = table.with_name(f".{table.name}.writing")
        temporary.write_text("".join(islice(rows, len(part))), encoding="ascii")
        os.replace(temporary, table)
    print(
        f"{folder}: {count:,} images\n"
        f"train with: --task {'pathx' if settings.side == 128 else 'pathfinder'} --data {folder}"
        + (f" --model.max-length {settings.side**2}" if settings.side in (64, 256) else "")
    )


def _write_picture(folder: Path, settings: Settings, seed: int, index: int) -> str:
    """Writes a picture and returns its row of metadata."""
    picture, label, margin = draw_picture(settings, seed, index)
    place, number = f"imgs/{index // IMAGES_PER_FOLDER}", index % IMAGES_PER_FOLDER
    Image.fromarray(picture).save(folder / place / f"sample_{number}.png")
    parameters = [settings.continuity, settings.contour_length, settings.distractor_length, settings.paddle_length]
    values = [place, f"sample_{number}.png", number, label, *parameters, settings.thickness, margin, 1]
    return " ".join(map(str, values)) + "\n"


def _table(folder: Path, start: int) -> Path:
    return folder / "metadata" / f"{start // IMAGES_PER_FOLDER}.npy"


def _begin(folder: Path, identity: dict) -> None:
    """Makes the folder, or makes sure that it is an unfinished one of the same settings."""
    note = folder / "generated.json"
    if note.exists():
        if json.loads(note.read_text(encoding="utf-8")) != identity:
            raise UserError(f"{folder} holds pictures of other settings, as {note} says: choose another folder")
        return
    _refuse_existing([folder / "metadata", folder / "imgs"])
    (folder / "metadata").mkdir(parents=True)
    note.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def _pack(out: Path, task: str, data: str, max_length: int, workers: int) -> None:
    if out.suffix != SUFFIX:
        raise UserError(f"the packed file must be named something{SUFFIX}, not {out}")
    _refuse_existing([out])
    chosen = get_task(task)
    pack(out, chosen, open_source(chosen, data, max_length, seed=0), max_length, workers, progress=True)
    splits = read_packed(out).splits
    print(f"{out}: {', '.join(f'{len(split.labels):,} in {name}' for name, split in splits.items())}")


def _counts(given: list[int] | None, default: tuple[int, ...], what: str) -> tuple[int, ...]:
    if given is not None and (len(given) != len(default) or min(given) < 1):
        raise UserError(f"--count needs {len(default)} positive numbers here: {what}")
    return tuple(given) if given else default


def _refuse_existing(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.exists():
            raise UserError(f"{path} is already there: choose another place")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
