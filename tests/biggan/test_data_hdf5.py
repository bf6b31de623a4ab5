"""HDF5 files of BigGAN-PyTorch: what is read, and one clear error for whatever is wrong."""

import os
from pathlib import Path

import image_formats
import numpy as np
import pytest
from image_formats import IMAGES, LABELS, pixels, write

from biggan.data import open_images
from biggan.data.sources import open_source
from runtime.errors import UserError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.move("imgs", "x"), r"has no dataset 'imgs'; it has labels, x"),
        (
            lambda file: replace(file, "imgs", IMAGES),
            r"'imgs' .* must be uint8 \(N, 3, R, R\), not uint8 \(12, 16, 16, 3",
        ),
        (lambda file: replace(file, "imgs", np.zeros((2, 3, 4, 4))), "not float64"),
        (lambda file: replace(file, "imgs", np.zeros((0, 3, 4, 4), "u1")), "no images in"),
        (lambda file: replace(file, "imgs", np.zeros((), "u1")), r"not uint8 \(\)"),
        (lambda file: replace(file, "labels", LABELS[:5]), r"must be int64 \(12,\), not int64 \(5,\)"),
        (lambda file: replace(file, "labels", LABELS * 0.5), "not float64"),
        (lambda file: replace(file, "labels", LABELS - 2), r"must lie in 0 \.\. 1048575; found -2 \.\. 0"),
        (
            lambda file: absurd(file, (10**9, 3, 512, 512), (1, 3, 512, 512)),
            "claims 1,000,000,000 images .* cannot hold",
        ),
        (lambda file: absurd(file, (1, 3, 60000, 60000), (1, 3, 64, 64)), "claims 1 images of 60000 x 60000"),
        (lambda file: link_outside(file), "must be a dataset of that file"),
    ],
)
def test_wrong_hdf5(change, message, tmp_path):
    h5py = pytest.importorskip("h5py")
    path = write("hdf5", tmp_path)
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(UserError, match=message):
        open_source(path)


def replace(file, name, data):
    del file[name]
    file[name] = data


def absurd(file, shape, chunks):
    del file["imgs"]
    file.create_dataset("imgs", shape, "u1", chunks=chunks, compression="gzip")


def link_outside(file):
    import h5py

    other = Path(file.filename).with_name("other.hdf5")
    with h5py.File(other, "w") as target:
        target["imgs"] = IMAGES.transpose(0, 3, 1, 2)
    del file["imgs"]
    file["imgs"] = h5py.ExternalLink(str(other), "/imgs")


def test_a_damaged_chunk_of_hdf5_is_damaged_images(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = image_formats.write_hdf5(tmp_path / "a", IMAGES, LABELS, compression="gzip", chunks=(2, 3, 16, 16))
    with h5py.File(path) as file:
        chunk = file["imgs"].id.get_chunk_info(1)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset + 2)
        file.write(os.urandom(200))
    with pytest.warns(UserWarning, match=r"left out 2 damaged of 12 .*image 2 \(.*image 3 \("):
        dataset = open_images(path, 16, progress=False)
    assert np.array_equal(pixels(dataset), np.delete(IMAGES, (2, 3), axis=0))


def test_hdf5_without_labels_is_one_class(tmp_path):
    pytest.importorskip("h5py")
    for options in ({}, {"chunks": None, "compression": None}):
        dataset = open_images(write_unlabelled_hdf5(tmp_path, options), 16, progress=False)
        assert dataset.class_names == ["all"] and np.array_equal(pixels(dataset), IMAGES)


def write_unlabelled_hdf5(path, options):
    return image_formats.write_hdf5(path / "a", IMAGES, None, **options)
