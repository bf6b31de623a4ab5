"""Small files of every kind that the commands read, and for each kind a function that reads a damaged copy of one.

A reader returns "read" (there is content, of the right kind) or "same" (the very content of the undamaged file); it
raises UserError where the file is refused, and whatever else happens.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_formats import NEEDS, WRITERS, example_images
from image_variants import image_files

from biggan import checkpoints as gan_checkpoints
from biggan.config import AttentionConfig, ModelConfig
from biggan.config import TrainConfig as GanConfig
from biggan.conversion import convert_original
from biggan.data import open_images
from biggan.data.arrays import read_npz
from biggan.data.packed import write_packed
from biggan.gan import build_discriminator, build_generator
from biggan.metrics.statistics import FeatureProtocol, Statistics, load_statistics, save_statistics
from hrrformer import checkpoints as classifier_checkpoints
from hrrformer.learner import build_classifier
from hrrformer.tasks import get_task
from runtime import checkpoint
from runtime.config import to_dict
from runtime.errors import UserError
from tests.tiny_hrrformer import pack_text, tiny_image_config

Reader = Callable[[int, bytes], str]
RESOLUTION = 16
FORMATS = ("stylegan_zip", "webdataset", "tar_of_folders", "parquet", "hdf5", "rosinality")


def outcome(read: Reader, folder: Path, which: int, data: bytes) -> str:
    """Of reading a damaged file; `folder` is where the reader works, and the error is to name something in it."""
    try:
        return read(which, data)
    except UserError as error:
        assert 1 <= len(str(error).strip().splitlines()) <= 2 and str(folder) in str(error), repr(str(error))
        return "refused"


def images(folder: Path) -> tuple[Reader, list[bytes]]:
    """A folder and a zip, in turn, of one image."""
    files = image_files()
    names, archive, count = list(files), folder / "images.zip", iter(range(1 << 30))

    def read(which: int, data: bytes) -> str:
        if next(count) % 2:
            source, file = archive, archive
            with zipfile.ZipFile(archive, "w") as opened:
                opened.writestr(names[which], data)
        else:
            source, file = folder / "images", folder / "images" / names[which]
            source.mkdir(exist_ok=True)
            file.write_bytes(data)
        try:
            return _check_images(open_images(source, RESOLUTION, workers=1, progress=False))
        finally:
            file.unlink()

    return read, list(files.values())


def containers(folder: Path) -> tuple[Reader, list[bytes]]:
    """A zip, a packed file and a numpy archive of images."""
    pictures = [(name, data) for name, data in image_files().items() if len(data) < 1500][:3]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in pictures:
            archive.writestr(f"set/{name}", data)
    values = np.random.default_rng(0).integers(0, 256, (3, 3, RESOLUTION, RESOLUTION), dtype=np.uint8)
    about = {"capacity": 3, "resolution": RESOLUTION, "class_names": ["a", "b"], "source": "s", "fingerprint": "f"}
    write_packed(folder / "p.safetensors", ((image, i % 2) for i, image in enumerate(values)), **about)
    arrays = io.BytesIO()
    np.savez_compressed(arrays, x=values.transpose(0, 2, 3, 1), y=np.arange(3))
    paths = [folder / "images.zip", folder / "images.safetensors", folder / "images.npz"]

    def read(which: int, data: bytes) -> str:
        paths[which].write_bytes(data)
        if which == 2:
            return _check_images(read_npz(paths[which]))
        return _check_images(open_images(paths[which], RESOLUTION, workers=1, progress=False))

    return read, [buffer.getvalue(), (folder / "p.safetensors").read_bytes(), arrays.getvalue()]


def _check_images(dataset: Any) -> str:
    pixels, labels = dataset.take(torch.arange(len(dataset)))
    assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[1] == 3 and len(pixels) == len(labels) > 0
    assert 0 <= labels.min() <= labels.max() < dataset.num_classes and pixels.sum() >= 0
    return "read"


def formats(folder: Path) -> tuple[Reader, list[bytes]]:
    """The data sets of other programs: StyleGAN's zip, tars, and HDF5, Parquet and LMDB where there are packages."""
    pixels, labels = example_images(count=6, resolution=8)
    kinds = [kind for kind in FORMATS if kind not in NEEDS or importlib.util.find_spec(NEEDS[kind])]
    written = [WRITERS[kind](folder / kind, pixels, labels) for kind in kinds]
    written = [path / "data.mdb" if path.is_dir() else path for path in written]

    def read(which: int, data: bytes) -> str:
        written[which].write_bytes(data)
        return _check_images(open_images(written[which], RESOLUTION // 2, workers=1, progress=False))

    return read, [path.read_bytes() for path in written]


def checkpoints(folder: Path) -> tuple[Reader, list[bytes]]:
    """A checkpoint of a GAN's run, an export of it, and a checkpoint of a classifier's."""
    gan, run = folder / "gan.pt", folder / "classifier.pt"
    model = ModelConfig(resolution=32, generator_channels=2, discriminator_channels=2, dim_z=8)
    config = GanConfig(model=model, attention=AttentionConfig("dense", (16,), (16,)))
    generator, discriminator = build_generator(config).state_dict(), build_discriminator(config).state_dict()
    state = {"generator": generator, "ema_generator": generator, "discriminator": discriminator}
    moments = {name: {"exp_avg": value, "step": torch.tensor(3.0)} for name, value in list(generator.items())[:3]}
    progress = {"elapsed_sec": 1.5, "means": {"loss": [0.5, None]}, "restarts": 0, "watch": {"best": (1, "swd")}}
    data = {"position": 12, "count": 24, "fingerprint": "drawn"}
    rest = {"generator_optimizer": moments, "step": 3, "progress": progress, "data": data, "rng": torch.get_rng_state()}
    checkpoint.save(gan, {"config": to_dict(config), **state, **rest}, gan_checkpoints.KIND)
    gan_checkpoints.export(gan, folder / "export.safetensors")
    tiny = tiny_image_config("data", "out")
    weights = {f"classifier.{name}": value for name, value in build_classifier(tiny).state_dict().items()}
    tree = {"config": to_dict(tiny), "phase": "train", "step": 3, "weights": weights, "data": data}
    checkpoint.save(run, tree, classifier_checkpoints.KIND)
    readers = [gan_checkpoints.read, gan_checkpoints.read, lambda path: classifier_checkpoints.read(path)[1:]]
    paths = [gan, folder / "export.safetensors", run]
    truths = [_plain(read(path)) for read, path in zip(readers, paths, strict=True)]

    def read(which: int, data: bytes) -> str:
        paths[which].write_bytes(data)
        assert _plain(readers[which](paths[which])) == truths[which], "a damaged checkpoint was accepted"
        return "same"

    return read, [path.read_bytes() for path in paths]


def _plain(node: Any) -> Any:
    """Nested tuples that are equal where types, keys in any order, values and the bytes of tensors are."""
    if isinstance(node, torch.Tensor):
        data = node.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(node.dtype), tuple(node.shape), node.requires_grad, data
    if isinstance(node, dict):
        return type(node).__name__, sorted((repr(key), _plain(value)) for key, value in node.items())
    if isinstance(node, list | tuple):
        return type(node).__name__, [_plain(value) for value in node]
    return type(node).__name__, repr(node)


def foreign(folder: Path) -> tuple[Reader, list[bytes]]:
    """Files without a checksum of ours: G.pth of BigGAN-PyTorch in both formats, its progress, and statistics."""
    progress = {"itr": 120, "best_FID": np.float64(12.5), "config": {"n_hashes": 4, "activation": torch.nn.ReLU()}}
    weights = {"linear.weight": torch.ones(4, 4)}
    contents = [(name, value, new) for name, value in (("G", weights), ("state_dict", progress)) for new in (0, 1)]
    files = []
    for _, content, new in contents:
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=new)
        files.append(buffer.getvalue())
    protocol = FeatureProtocol("network", "hash", "rule", 32, "data", "all")
    values = np.arange(12.0).reshape(4, 3).astype(np.float32)
    save_statistics(folder / "s.npz", Statistics(np.zeros(3), np.eye(3), 4, protocol, values))
    files.append((folder / "s.npz").read_bytes())
    original = folder / "original"
    original.mkdir()

    def read(which: int, data: bytes) -> str:
        if which == len(contents):
            (folder / "s.npz").write_bytes(data)
            load_statistics(folder / "s.npz", protocol)
            return "read"
        torch.save({"linear.weight": torch.ones(4, 4)}, original / "G.pth")
        path = original / f"{contents[which][0]}.pth"
        path.write_bytes(data)
        try:
            convert_original(original)
        except UserError as error:
            if "tensor" in str(error) or "architecture" in str(error):  # what a G of one tensor is told
                return "read"
            raise UserError(f"{folder}: {error}") from None
        finally:
            path.unlink()
        return "read"

    return read, files


def tokens(folder: Path) -> tuple[Reader, list[bytes]]:
    """The files of the sequence tasks, in the midst of sound ones."""
    layouts = [_texts, _listops, _retrieval, _malware, _pathfinder, _cifar, _packed]
    made = []
    for layout in layouts:
        place = folder / layout.__name__
        place.mkdir()
        made.append((*layout(place), place))
    truths = [file.read_bytes() for _, _, file, _ in made]

    def read(which: int, data: bytes) -> str:
        task, length, file, place = made[which]
        file.write_bytes(data)
        path = file if file.suffix in (".gz", ".safetensors") and task == "text" else place
        if path.suffix == ".safetensors":
            from hrrformer.data import open_task

            opened = open_task(task, str(path), length, folder / "cache", progress=False)
            for split in (opened.train, opened.validation, opened.test):
                rows = split.rows(np.arange(len(split)), length)
                assert 0 <= rows.min() <= rows.max() < opened.vocab_size
            return "read"
        source = get_task(task).open(path, length)
        for split in source.sizes:
            for inputs, label in source.read(split, 1):
                assert 0 <= label < len(source.class_names) and all(len(symbols) <= length for symbols in inputs)
        return "read"

    return read, truths


def _texts(place: Path) -> tuple[str, int, Path]:
    with tarfile.open(place / "aclImdb.tar.gz", "w:gz") as archive:
        for name in (f"{split}/{kind}" for split in ("train", "test") for kind in ("pos", "neg")):
            info = tarfile.TarInfo(f"aclImdb/{name}/0.txt")
            info.size = 9
            archive.addfile(info, io.BytesIO(b"fine film"))
    return "text", 64, place / "aclImdb.tar.gz"


def _listops(place: Path) -> tuple[str, int, Path]:
    rows = b"Source\tTarget\n" + b"( ( ( [MAX 3 ) 4 ) ] )\t4\n" * 5
    for name in ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"):
        (place / name).write_bytes(rows)
    return "listops", 64, place / "basic_val.tsv"


def _retrieval(place: Path) -> tuple[str, int, Path]:
    rows = b"1.0\t1\t2\tone text\tanother\n0.0\t3\t4\tthird\tfourth\n" * 3
    for split in ("train", "eval", "test"):
        (place / f"new_aan_pairs.{split}.tsv").write_bytes(rows)
    return "retrieval", 64, place / "new_aan_pairs.eval.tsv"


def _malware(place: Path) -> tuple[str, int, Path]:
    for split in ("train", "test"):
        for kind in ("benign", "malware"):
            (place / split / kind).mkdir(parents=True)
            (place / split / kind / "a.gz").write_bytes(gzip.compress(bytes(range(200)), mtime=0))
    return "malware", 64, place / "train" / "benign" / "a.gz"


def _pathfinder(place: Path) -> tuple[str, int, Path]:
    from PIL import Image

    (place / "metadata").mkdir()
    (place / "imgs" / "0").mkdir(parents=True)
    for i in range(3):
        Image.new("L", (8, 8), 40 * i).save(place / "imgs" / "0" / f"sample_{i}.png")
    rows = "".join(f"imgs/0 sample_{i}.png {i} {i % 2} 14 1 2\n" for i in range(3))
    (place / "metadata" / "0.npy").write_text(rows)
    return "pathfinder", 64, place / "metadata" / "0.npy"


def _cifar(place: Path) -> tuple[str, int, Path]:
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (place / name).write_bytes(pickle.dumps(content, protocol=2))
    return "image", 64, place / "data_batch_1"


def _packed(place: Path) -> tuple[str, int, Path]:
    return "text", 24, pack_text(place)


KINDS = {
    "images": images,
    "containers": containers,
    "formats": formats,
    "checkpoints": checkpoints,
    "foreign": foreign,
    "tokens": tokens,
}
