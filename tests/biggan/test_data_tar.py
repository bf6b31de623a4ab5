"""Tars, plain and webdataset's: samples, labels, and damage that tarfile does not notice."""

import tarfile

import image_formats
import numpy as np
import pytest
from image_formats import IMAGES, png, write

from biggan.data import open_images
from biggan.data.sources import open_source
from runtime.errors import UserError


def sample(**files):
    """A tar's files of one sample, by extension."""
    return {f"000.{extension.replace('_', '.')}": data for extension, data in files.items()}


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (sample(png=png(IMAGES[0]), cls=b"2\n"), [2]),
        (sample(png=png(IMAGES[0]), json=b'{"label": 1, "caption": "a cat"}'), [1]),
        (sample(png=png(IMAGES[0]), json=b'{"cls": 1}'), [1]),
        (sample(png=png(IMAGES[0]), json=b'{"caption": "a cat"}', txt=b"a cat"), [0]),
        (sample(png=png(IMAGES[0]), seg_png=png(IMAGES[1]), cls=b"0"), [0]),
        ({"my.holiday.png": png(IMAGES[0]), "b/.hidden.png": b""}, [0]),
        ({"../../up.png": png(IMAGES[0]), "a.png": png(IMAGES[0])}, [0]),
    ],
)
def test_samples_of_a_tar(files, labels, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    source = open_source(image_formats.write_tar(tmp_path / "a", files))
    records = list(source)
    assert [record.label for record in records] == labels
    assert np.array_equal(np.asarray(records[0].open()), IMAGES[0])
    assert set(tmp_path.rglob("*")) == {*before, tmp_path / "a.tar"}  # nothing is extracted


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (sample(png=b"", cls=b"two"), "000.cls in .* is damaged: b'two'"),
        (sample(png=b"", cls=b"1.5"), "must be a whole number, not '1.5'"),
        (sample(png=b"", json=b'{"label": "cat"}'), "must be a whole number, not 'cat'"),
        (sample(png=b"", json=b'{"label": '), "000.json in .* is damaged"),
        (sample(png=b"", json=b"[" * 100_000), "000.json in .* is damaged"),
        (sample(png=b"", cls=b"-4"), "found -4"),
        (sample(png=b"", cls=b"1" * 30), "must be a whole number"),
        (sample(png=b"", cls=b"1" * (1 << 21)), "too many for a label"),
        ({"0.png": b"", "0.cls": b"1", "1.png": b""}, "1 of 2 images have no label, a.tar/1.png for one"),
        ({"0.txt": b""}, r"no images in .*found 1 \.txt"),
        ({}, "no images in .*found no files at all"),
        ({"train/1.png": b"", "test/1.png": b""}, "holds the splits test, train"),
    ],
)
def test_wrong_tars(files, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_source(image_formats.write_tar(tmp_path / "a", files))


def test_a_broken_header_in_a_tar_is_not_its_end(tmp_path):
    path = write("webdataset", tmp_path)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[8].offset
    data[offset + 3] ^= 255
    path.write_bytes(data)
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 8  # the standard library's own reading
    with pytest.raises(UserError, match=f"damaged or cut short, at byte {offset:,}"):
        open_source(path)


def test_sizes_that_lead_backwards_in_a_tar_do_not_hang(tmp_path):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("0.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-1024 & (1 << 96) - 1).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(bytes(header) + bytes(10240))
    with pytest.raises(UserError, match="damaged"):
        open_source(path)


def test_a_damaged_image_in_a_tar_is_named(tmp_path):
    files = {f"{number}.png": png(image) for number, image in enumerate(IMAGES)} | {"7.png": b"broken"}
    with pytest.warns(UserWarning, match=r"left out 1 damaged .*a\.tar/7\.png \(not an image"):
        assert len(open_images(image_formats.write_tar(tmp_path / "a", files), 16, progress=False)) == 11


def test_compressed_tars_say_what_to_do(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match="unpack it with gunzip"):
        open_source(tmp_path / "a.tar.gz")
