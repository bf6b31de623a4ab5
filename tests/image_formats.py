"""The same labelled images in every format that `open_source` reads."""

import io
import json
import tarfile
import zipfile

import numpy as np
from PIL import Image

CLASS_NAMES = ["cat", "dog", "owl"]


def example_images(count=12, resolution=16, seed=0):
    """uint8 (N, R, R, 3) and labels (N,), classes in order so that folders keep it."""
    images = np.random.default_rng(seed).integers(0, 256, (count, resolution, resolution, 3), dtype=np.uint8)
    return images, np.arange(count) * len(CLASS_NAMES) // count


IMAGES, LABELS = example_images()


def write(kind, folder, labels=LABELS, images=IMAGES):
    """A data set in a format of WRITERS; returns its path."""
    return WRITERS[kind](folder / kind, images, labels)


def pixels(dataset):
    """(N, R, R, 3), as `example_images` gives them."""
    return dataset.images.numpy().transpose(0, 2, 3, 1)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(path, images, labels):
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = path / CLASS_NAMES[label] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    return path


def write_zip(path, images, labels):
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            archive.writestr(f"{CLASS_NAMES[label]}/{number}.png", png(image))
    return path


def stylegan_names(count):
    return [f"{number // 5:05d}/img{number:08d}.png" for number in range(count)]


def write_stylegan_zip(path, images, labels):
    path = path.with_suffix(".zip")
    names = stylegan_names(len(images))
    pairs = None if labels is None else [[name, int(label)] for name, label in zip(names, labels, strict=True)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, png(image))
        archive.writestr("dataset.json", json.dumps({"labels": pairs}))
    return path


def write_stylegan_folder(path, images, labels):
    with zipfile.ZipFile(write_stylegan_zip(path, images, labels)) as archive:
        archive.extractall(path)
    return path


def write_hdf5(path, images, labels, **options):
    import h5py

    path = path.with_suffix(".hdf5")
    with h5py.File(path, "w") as file:
        options = {"chunks": (5, *images.transpose(0, 3, 1, 2).shape[1:]), "compression": "lzf"} | options
        file.create_dataset("imgs", data=images.transpose(0, 3, 1, 2), **options)
        if labels is not None:
            file.create_dataset("labels", data=np.asarray(labels, dtype=np.int64))
    return path


def write_lmdb(path, entries):
    import lmdb

    with lmdb.open(str(path), map_size=1 << 26) as env, env.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path


def write_lsun(path, images, labels):
    return write_lmdb(path, {f"{number:04x}-key".encode(): png(image) for number, image in enumerate(images)})


def write_rosinality(path, images, labels):
    entries = {f"16-{number:05d}".encode(): png(image) for number, image in enumerate(images)}
    small = {f"8-{number:05d}".encode(): png(image[:8, :8]) for number, image in enumerate(images)}
    return write_lmdb(path, entries | small | {b"length": str(len(images)).encode()})


def parquet_table(images, labels, in_struct=True, image="image", label="label", class_names=CLASS_NAMES):
    import pyarrow

    data = [png(array) for array in images]
    column = [{"bytes": value, "path": f"{number}.png"} for number, value in enumerate(data)] if in_struct else data
    columns = {image: column} | ({} if labels is None else {label: [int(value) for value in labels]})
    table = pyarrow.table(columns)
    features = {image: {"_type": "Image"}, label: {"names": class_names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(path, images, labels, **options):
    from pyarrow import parquet

    path = path.with_suffix(".parquet")
    parquet.write_table(parquet_table(images, labels, **options), path, row_group_size=5)
    return path


def write_parquet_shards(path, images, labels):
    path.mkdir()
    half = len(images) // 2
    for shard, part in enumerate((slice(0, half), slice(half, None))):
        write_parquet(path / f"train-0000{shard}-of-00002", images[part], labels[part])
    return path


def write_tar(path, files):
    path = path.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_webdataset(path, images, labels):
    files = {}
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        files[f"{number:06d}.cls"] = str(label).encode()
        files[f"{number:06d}.png"] = png(image)
    return write_tar(path, files)


def write_webdataset_shards(path, images, labels):
    path.mkdir()
    half = len(images) // 2
    for shard, part in enumerate((slice(0, half), slice(half, None))):
        write_webdataset(path / f"faces-{shard:06d}", images[part], labels[part])
    return path


def write_tar_of_folders(path, images, labels):
    names = [f"./{CLASS_NAMES[label]}/{number}.png" for number, label in enumerate(labels)]
    return write_tar(path, dict(zip(names, map(png, images), strict=True)))


NAMED = ("folder", "zip", "tar_of_folders", "parquet", "parquet_shards")  # formats that have names for classes
UNLABELLED = ("lsun", "rosinality")
NEEDS = {
    **{"hdf5": "h5py", "lsun": "lmdb", "rosinality": "lmdb"},
    **{"parquet": "pyarrow", "parquet_shards": "pyarrow"},
}
WRITERS = {
    "folder": write_folder,
    "zip": write_zip,
    "stylegan_zip": write_stylegan_zip,
    "stylegan_folder": write_stylegan_folder,
    "hdf5": write_hdf5,
    "lsun": write_lsun,
    "rosinality": write_rosinality,
    "parquet": write_parquet,
    "parquet_shards": write_parquet_shards,
    "webdataset": write_webdataset,
    "webdataset_shards": write_webdataset_shards,
    "tar_of_folders": write_tar_of_folders,
}
