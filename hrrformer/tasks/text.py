"""Text: the sentiment of a film review, read byte by byte.

Source: the Large Movie Review Dataset, Maas et al. 2011; as a byte task, Tay et al. 2020, arXiv:2011.04006.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

from hrrformer.tasks.files import class_files, locate, natural, stamp
from hrrformer.tasks.protocol import Example, Source, Task
from runtime.archives import open_tar
from runtime.errors import UserError, of_the_system

SPLITS = ("train", "test")
CLASS_NAMES = ("neg", "pos")
REVIEWS = 25_000  # in each split, for the progress of an archive, which has no table of contents
WHERE = (
    "the folder aclImdb with {train,test}/{neg,pos}/*.txt, or its archive aclImdb_v1.tar.gz, unpacked or not "
    "(https://ai.stanford.edu/~amaas/data/sentiment/)"
)


def _open(path: Path, max_length: int) -> Source:
    return _open_archive(path, max_length) if path.is_file() else _open_folder(path, max_length)


def _open_folder(path: Path, max_length: int) -> Source:
    folder = locate(path, SPLITS, ("aclImdb",), WHERE)
    files = class_files(folder, SPLITS, CLASS_NAMES, _reviews, ".txt files", WHERE)

    def read(split: str, workers: int) -> Iterator[Example]:
        for file, label in files[split]:
            with file.open("rb") as opened:
                yield (opened.read(max_length),), label

    return Source(
        title=str(folder),
        stamp=stamp(file for split in SPLITS for file, _ in files[split]),
        class_names=CLASS_NAMES,
        sizes={split: len(files[split]) for split in SPLITS},
        read=read,
    )


def _reviews(folder: Path) -> list[Path]:
    return [folder / name for name in natural(file.name for file in folder.glob("*.txt") if file.is_file())]


def _open_archive(path: Path, max_length: int) -> Source:
    @cache
    def reviews() -> dict[tuple[str, str], dict[str, bytes]]:
        """{(split, class): {name: text}}: one pass over the archive, which keeps them in any order."""
        found: dict[tuple[str, str], dict[str, bytes]] = {(split, name): {} for split in SPLITS for name in CLASS_NAMES}
        try:
            with open_tar(path) as archive:
                for member in archive:
                    name = PurePosixPath(member.name)
                    if member.isreg() and name.suffix == ".txt" and name.parts[-3:-1] in found:
                        found[name.parts[-3:-1]][name.name] = archive.extractfile(member).read(max_length)
        except UserError:
            raise
        except Exception as error:  # not only TarError: every decompressor, and every field of a header, has its own
            if of_the_system(error):
                raise
            raise UserError(f"{path} is no tar archive, damaged, or cut short. Needed: {WHERE}") from None
        for (split, name), texts in found.items():
            if not texts:
                raise UserError(f"{path} has no .txt files in {split}/{name}. Needed: {WHERE}")
        return found

    def read(split: str, workers: int) -> Iterator[Example]:
        for label, class_name in enumerate(CLASS_NAMES):
            texts = reviews()[split, class_name]
            for name in natural(texts):
                yield (texts[name],), label

    sizes = dict.fromkeys(SPLITS, REVIEWS)
    return Source(title=str(path), stamp=stamp([path]), class_names=CLASS_NAMES, sizes=sizes, read=read)


TEXT = Task(
    name="text",
    title="sentiment of film reviews, byte by byte",
    vocab_size=257,
    first_id=1,
    max_length=4000,
    class_names=CLASS_NAMES,
    uses_mask=True,
    where=WHERE,
    open=_open,
)
