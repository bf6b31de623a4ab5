"""Image: CIFAR-10 in grey, read pixel by pixel; any other images in class folders; digits drawn here for a try.

Source: Krizhevsky 2009; as a sequence task, Tay et al. 2020, arXiv:2011.04006.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from hrrformer.tasks.cifar import BATCHES, CIFAR_FOLDER, read_batch
from hrrformer.tasks.digits import draw_digits
from hrrformer.tasks.files import natural, stamp, walk
from hrrformer.tasks.parallel import ordered_map
from hrrformer.tasks.pixels import check_file_size, decode, grey, read_file, side_of
from hrrformer.tasks.protocol import Example, Source, Task
from runtime.errors import UserError, of_the_system

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = ("train", "test")
GENERATED = {"train": 20_000, "validation": 2_000, "test": 2_000}
WHERE = (
    f"{CIFAR_FOLDER} (https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz unpacked, or as torchvision left it), "
    "or a folder or zip with {train,test}/CLASS/ and images in it"
)
_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def _open(path: Path, max_length: int) -> Source:
    side = side_of(max_length)
    if path.is_file():
        return _open_zip(path, side)
    for folder in (path, path / CIFAR_FOLDER):
        if (folder / BATCHES["train"][0]).exists():
            return _open_cifar(folder, side)
    return _open_folder(path, side)


def _open_cifar(folder: Path, side: int) -> Source:
    files = {split: [folder / name for name in names] for split, names in BATCHES.items()}
    missing = [file.name for split in SPLITS for file in files[split] if not file.is_file()]
    if missing:
        raise UserError(f"{folder} has no {', '.join(missing)}. Needed: {WHERE}")

    def read(split: str, workers: int) -> Iterator[Example]:
        for file in files[split]:
            images, labels = read_batch(file)  # uint8 (n, 32, 32, 3)
            for image, label in zip(images, labels, strict=True):
                yield (_to_tokens(Image.fromarray(image), side),), label

    return Source(
        title=str(folder),
        stamp=stamp(file for split in SPLITS for file in files[split]),
        class_names=CIFAR_CLASSES,
        sizes={split: 10_000 * len(files[split]) for split in SPLITS},
        read=read,
    )


def _open_folder(folder: Path, side: int) -> Source:
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise UserError(f"{folder} has no folder {split}. Needed: {WHERE}")
    files = {file.relative_to(folder).as_posix(): file for split in SPLITS for file in walk(folder / split)}

    def read_bytes(name: str) -> bytes:
        try:
            return read_file(files[name])
        except OSError as error:
            raise UserError(f"cannot read {files[name]}: {error.strerror or error}") from None
        except ValueError as error:
            raise UserError(f"{files[name]} is not a sound image: {error}") from None

    return _class_folders(folder, side, files, stamp(files.values()), read_bytes)


def _open_zip(path: Path, side: int) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # not only BadZipFile: broken directories also give struct.error, ValueError, ...
        if of_the_system(error):
            raise
        raise UserError(f"{path} is no sound zip: {error}. Needed: {WHERE}") from None
    members = {info.filename: f"{info.file_size} {info.CRC:08x}" for info in archive.infolist()}
    members = {name: stamp for name, stamp in members.items() if name and not name.endswith("/")}

    def read_bytes(name: str) -> bytes:
        try:
            check_file_size(archive.getinfo(name).file_size)
            return archive.read(name)
        except Exception as error:  # encrypted, broken, of an unknown method: every decompressor has its own
            raise UserError(f"{path}/{name} cannot be unpacked: {error}") from None

    return _class_folders(path, side, members, repr(members), read_bytes)


def _class_folders(
    where: Path, side: int, names: dict[str, object], stamp_text: str, read_bytes: Callable[[str], bytes]
) -> Source:
    """Images named .../SPLIT/CLASS/FILE, such as cifar10/train/airplane/0001.jpg."""
    found: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for name in natural(names):
        parts = PurePosixPath(name).parts
        if len(parts) >= 3 and parts[-3] in found and PurePosixPath(name).suffix.lower() in _EXTENSIONS:
            found[parts[-3]].setdefault(parts[-2], []).append(name)
    class_names = tuple(sorted(found["train"]))
    if len(class_names) < 2 or not found["test"]:
        raise UserError(f"{where} has no images in train/CLASS/ and test/CLASS/. Needed: {WHERE}")
    different = sorted(set(found["train"]) ^ set(found["test"]))
    if different:
        raise UserError(f"{where}: the classes {', '.join(different)} have images in only one of train and test")

    def read(split: str, workers: int) -> Iterator[Example]:
        listed = [(name, label) for label, names in enumerate(found[split][c] for c in class_names) for name in names]
        files = ((f"{where}/{name}", read_bytes(name)) for name, _ in listed)
        for tokens, (_, label) in zip(ordered_map(partial(read_image, side), files, workers), listed, strict=True):
            yield (tokens,), label

    return Source(
        title=str(where),
        stamp=hashlib.sha256(stamp_text.encode()).hexdigest(),
        class_names=class_names,
        sizes={split: sum(len(names) for names in found[split].values()) for split in SPLITS},
        read=read,
    )


def read_image(side: int, file: tuple[str, bytes]) -> bytes:
    """The grey pixels of an image file, given as name and contents; resized (Lanczos) where it is not of that size.

    Raises:
        UserError: not an image, or a damaged one.
    """
    name, data = file
    try:
        return _to_tokens(decode(data).convert("RGB"), side)
    except ValueError as error:
        raise UserError(f"{name} is not a sound image: {error}") from None


def _to_tokens(image: Image.Image, side: int) -> bytes:
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    return grey(np.asarray(image)).tobytes()


def _generate(max_length: int, seed: int) -> Source:
    side = side_of(max_length)
    first = dict(zip(GENERATED, np.cumsum([0, *GENERATED.values()]).tolist(), strict=False))

    def read(split: str, workers: int) -> Iterator[Example]:
        end = first[split] + GENERATED[split]
        batches = (range(start, min(start + 200, end)) for start in range(first[split], end, 200))
        for images, labels in ordered_map(partial(draw_digits, seed, side), batches, workers, chunk=1):
            for image, label in zip(images, labels, strict=True):
                yield (image.tobytes(),), int(label)

    return Source(
        title=f"generated digits of {side} x {side} pixels",
        stamp=f"seed {seed}, {GENERATED}",
        class_names=tuple("0123456789"),
        sizes=dict(GENERATED),
        read=read,
    )


IMAGE = Task(
    name="image",
    title="objects in small pictures, pixel by pixel",
    vocab_size=256,
    first_id=0,
    max_length=32 * 32,
    class_names=CIFAR_CLASSES,
    uses_mask=False,
    where=WHERE,
    open=_open,
    generate=_generate,
)
