"""LMDBs of both layouts, and the pages of LMDB itself against its own library."""

import os

import image_formats
import numpy as np
import pytest
from image_formats import IMAGES, pixels, png, write

from biggan.data import open_images
from biggan.data.decode import DamagedImage
from biggan.data.lmdb_pages import lmdb_values
from biggan.data.sources import open_source
from runtime.errors import UserError


def test_the_resolution_of_an_lmdb_can_be_chosen(tmp_path):
    pytest.importorskip("lmdb")
    path = write("rosinality", tmp_path)
    assert next(iter(open_source(path))).open().size == (16, 16)
    for source in (path / "8", path / "data.mdb" / "8"):
        small = open_images(source, 8, progress=False)
        assert np.array_equal(pixels(small), IMAGES[:, :8, :8]) and small.source == str(source)
    with pytest.raises(UserError, match=r"has no '32'; its resolutions are 8, 16"):
        open_source(path / "32")
    with pytest.raises(UserError, match="one kind only"):
        open_source(write("lsun", tmp_path) / "8")


def test_values_of_an_lmdb_that_are_no_images_and_an_empty_one(tmp_path):
    pytest.importorskip("lmdb")
    values = {str(number): png(image) for number, image in enumerate(IMAGES)} | {"5": b"pickled", "6": b""}
    path = image_formats.write_lmdb(tmp_path / "odd", {key.encode(): value for key, value in values.items()})
    with pytest.warns(
        UserWarning, match=r"left out 2 damaged .*5 \(not an image of a known format\), 6 \(empty file\)"
    ):
        assert len(open_images(path, 16, progress=False)) == 10
    with pytest.raises(UserError, match="no images in .*it has no keys"):
        open_source(image_formats.write_lmdb(tmp_path / "empty", {}))


@pytest.mark.parametrize("seed", range(8))
def test_values_of_an_lmdb_are_those_that_its_library_finds(seed, tmp_path):
    """After puts, overwrites and deletions of values within pages and on pages of their own, in trees of some depth."""
    lmdb = pytest.importorskip("lmdb")
    random = np.random.default_rng(seed)
    with lmdb.open(str(tmp_path), map_size=1 << 26, max_dbs=2) as env:
        for _ in range(random.integers(1, 4)):
            with env.begin(write=True) as transaction:
                for _ in range(random.integers(1, 600)):
                    key = b"%d" % random.integers(300) + b"k" * int(random.choice([0, 1, 400]))
                    if random.random() < 0.7:
                        transaction.put(key, random.bytes(int(random.choice([0, 9, 900, 2500, 9000]))))
                    else:
                        transaction.delete(key)
        with env.begin() as transaction:
            expected = list(transaction.cursor())
        env.open_db(b"another database in it")
    file = tmp_path / "data.mdb"
    data = file.read_bytes()
    assert [(key, data[place : place + size]) for key, place, size in lmdb_values(file)] == expected


def test_an_lmdb_that_is_cut_short_between_listing_and_reading(tmp_path):
    pytest.importorskip("lmdb")
    path = write("lsun", tmp_path)
    record = list(open_source(path))[-1]
    os.truncate(path / "data.mdb", 4096)
    with pytest.raises(DamagedImage, match="cut short"):
        record.open()


def test_an_lmdb_whose_pages_lead_in_a_circle_or_out_of_the_file(tmp_path):
    pytest.importorskip("lmdb")
    path = image_formats.write_lmdb(tmp_path / "a", {b"%04d" % number: bytes(500) for number in range(200)})
    file = path / "data.mdb"
    whole = file.read_bytes()
    root = int.from_bytes(whole[4096 + 128 : 4096 + 136], "little")
    first = root * 4096 + int.from_bytes(whole[root * 4096 + 16 : root * 4096 + 18], "little")
    for below, message in (
        (root, "is reached twice"),
        (10**6, "is missing"),
        (0, "is none"),
        ((1 << 48) - 1, "is missing"),
    ):
        number = below.to_bytes(6, "little")
        file.write_bytes(whole[:first] + number + whole[first + 6 :])
        with pytest.raises(UserError, match=f"damaged, cut short or no LMDB: page {below} {message}"):
            open_source(path)
