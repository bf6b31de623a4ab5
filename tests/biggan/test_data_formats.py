"""What all formats have in common: the same images in each, threads, hashes; and which format a path is of."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import image_formats
import numpy as np
import pytest
from image_formats import CLASS_NAMES, IMAGES, LABELS, NAMED, NEEDS, UNLABELLED, WRITERS, pixels, png, write

from biggan.data import open_images
from biggan.data.sources import open_source
from runtime.errors import UserError


@pytest.fixture(params=WRITERS)
def kind(request):
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    return request.param


def test_the_same_images_from_every_format(kind, tmp_path):
    dataset = open_images(write(kind, tmp_path), 16, progress=False)
    assert np.array_equal(pixels(dataset), IMAGES)
    assert dataset.labels.tolist() == ([0] * 12 if kind in UNLABELLED else LABELS.tolist())
    assert dataset.class_names == (["all"] if kind in UNLABELLED else CLASS_NAMES if kind in NAMED else ["0", "1", "2"])


def test_records_are_opened_from_several_threads_at_once(kind, tmp_path):
    records = list(open_source(write(kind, tmp_path))) * 20
    order = np.random.default_rng(0).permutation(len(records))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: np.asarray(records[place].open()), order))
    assert np.array_equal(np.stack(found), IMAGES[order % 12])


def test_the_hash_follows_contents_and_labels(kind, tmp_path):
    path = write(kind, tmp_path)
    for name in ("labels", "images"):
        (tmp_path / name).mkdir()
    first = open_source(path).listing_hash
    assert open_source(path).listing_hash == first
    hashes = {first}
    if kind not in UNLABELLED:
        hashes.add(open_source(write(kind, tmp_path / "labels", LABELS[::-1].copy())).listing_hash)
    hashes.add(open_source(write(kind, tmp_path / "images", LABELS, IMAGES[::-1])).listing_hash)
    assert len(hashes) == (2 if kind in UNLABELLED else 3)


@pytest.mark.parametrize("kind", ["hdf5", "parquet"])
def test_a_missing_package_is_named_with_its_extra(kind, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[kind])
    path = write(kind, tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == NEEDS[kind]] + [NEEDS[kind]]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"needs the package {NEEDS[kind]} .*pip install smyrf-hrr\[{kind}\]"):
        open_source(path)


def test_files_that_are_cut_short(kind, tmp_path):
    path = write(kind, tmp_path)
    if kind.endswith("folder"):
        pytest.skip("a folder of image files")
    files = [path / "data.mdb"] if kind in UNLABELLED else sorted(path.iterdir()) if path.is_dir() else [path]
    whole = files[-1].read_bytes()
    end = len(whole.rstrip(b"\0")) - 1 if "webdataset" in kind or "tar" in kind else len(whole) - 1
    for length in (0, 10, 600, len(whole) // 2, end):
        files[-1].write_bytes(whole[:length])
        with pytest.raises(UserError) as error:
            open_images(path, 16, progress=False)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_an_unlabelled_stylegan_set_is_one_class_whatever_its_folders(tmp_path):
    for kind in ("stylegan_zip", "stylegan_folder"):
        source = open_source(write(kind, tmp_path, labels=None))
        assert source.class_names == ["all"] and len(source) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"labels": [["00000/img00000000.png", 1]]}', "no label for 11 of 12 images, 00000/img00000001.png for one"),
        ('{"labels": [["a", 1], ["b"', "is damaged"),
        ('{"labels": 5}', "is damaged"),
        ({"labels": [0.5, 1.0]}, r"whole numbers; found \[0.5, 1.0\]"),
        ({"labels": True}, "whole numbers; found true"),
        ({"labels": -3}, r"must lie in 0 \.\. 1048575; found -3"),
        ({"labels": 1 << 62}, r"must lie in 0 \.\. 1048575"),
        ({"labels": 1 << 70}, "whole numbers"),
    ],
)
def test_wrong_labels_of_stylegan(content, message, tmp_path):
    path = write("stylegan_folder", tmp_path)
    if isinstance(content, dict):  # one label for all
        content = json.dumps({"labels": [[name, content["labels"]] for name in image_formats.stylegan_names(12)]})
    (path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_source(path)


def test_another_programs_dataset_json_is_left_alone(tmp_path):
    path = write("folder", tmp_path)
    (path / "dataset.json").write_text('{"name": "pets"}')
    assert open_source(path).class_names == CLASS_NAMES


def test_shards_beside_images_or_class_folders_are_not_the_data(tmp_path):
    path = write("folder", tmp_path)
    shutil.copy(write("webdataset", tmp_path), path / "old.tar")
    assert open_source(path).class_names == CLASS_NAMES
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "1.png").write_bytes(png(IMAGES[0]))
    shutil.copy(path / "old.tar", flat)
    assert len(open_source(flat)) == 1


def test_a_path_inside_a_file_that_has_no_inside(tmp_path):
    path = write("webdataset", tmp_path)
    with pytest.raises(UserError, match="is no folder, and no zip that could hold 'train'"):
        open_source(path / "train")
