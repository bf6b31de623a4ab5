"""Parquet files of the Hugging Face hub: columns, shards, row groups, and what is wrong with them."""

import shutil

import image_formats
import numpy as np
import pytest
from image_formats import CLASS_NAMES, IMAGES, LABELS, pixels, png, write

from biggan.data import open_images
from biggan.data.sources import open_source
from runtime.errors import UserError


def parquet_file(path, table, **options):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(table, path, **options)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"in_struct": False},
        {"image": "img", "label": "labels"},
        {"image": "photo", "label": "fine_label"},  # found by the hub's description
    ],
)
def test_columns_of_parquet(options, tmp_path):
    pytest.importorskip("pyarrow")
    dataset = open_images(image_formats.write_parquet(tmp_path / "a", IMAGES, LABELS, **options), 16, progress=False)
    assert np.array_equal(pixels(dataset), IMAGES)
    assert dataset.labels.tolist() == LABELS.tolist() and dataset.class_names == CLASS_NAMES


def test_parquet_without_names_labels_or_with_all_of_minus_one(tmp_path):
    pytest.importorskip("pyarrow")
    table = image_formats.parquet_table(IMAGES, LABELS)
    named = open_source(parquet_file(tmp_path / "a.parquet", table.replace_schema_metadata(None)))
    assert named.class_names == ["0", "1", "2"]
    for other in (table.drop_columns(["label"]), image_formats.parquet_table(IMAGES, LABELS * 0 - 1)):
        assert open_source(parquet_file(tmp_path / "a.parquet", other)).class_names == ["all"]


def wrong_tables():
    pyarrow = pytest.importorskip("pyarrow")
    table = image_formats.parquet_table(IMAGES, LABELS)
    bare = table.replace_schema_metadata(None)
    yield bare.rename_columns(["picture", "label"]), "has no column image or img; its columns are picture, label"
    yield bare.set_column(0, "image", pyarrow.array(["x"] * 12)), "'image' .* must be binary or a struct"
    yield bare.set_column(1, "label", pyarrow.array(["cat"] * 12)), "'label' .* must hold whole numbers, not string"
    yield bare.set_column(1, "label", pyarrow.array([None] + [1] * 11)), "no label for some of its rows"
    yield bare.set_column(1, "label", pyarrow.array([-1] + [1] * 11)), r"must lie in 0 \.\. 1048575; found -1"
    yield table.set_column(1, "label", pyarrow.array([3] * 12)), r"must lie in 0 \.\. 2; found 3"
    yield table.slice(0, 0), "no images in .*it has no rows"


def test_wrong_parquet(tmp_path):
    for table, message in wrong_tables():
        with pytest.raises(UserError, match=message):
            open_source(parquet_file(tmp_path / "a.parquet", table))


def test_rows_without_bytes_and_damaged_groups_are_damaged_images(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    column = [{"bytes": png(image), "path": None} for image in IMAGES]
    column[4], column[5] = None, {"bytes": None, "path": "elsewhere.png"}
    path = parquet_file(tmp_path / "a.parquet", pyarrow.table({"image": column}), row_group_size=4, compression="none")
    with pytest.warns(
        UserWarning, match=r"left out 2 damaged .*a\.parquet row 4 \(a row without .*a\.parquet row 5 \("
    ):
        dataset = open_images(path, 16, progress=False)
    assert np.array_equal(pixels(dataset), np.delete(IMAGES, (4, 5), axis=0))
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(100) + data[104:])  # the first row group
    with pytest.warns(UserWarning, match=r"left out 6 damaged .*row 0 .*row 3"):
        dataset = open_images(path, 16, progress=False, max_damaged_fraction=0.5)
    assert np.array_equal(pixels(dataset), IMAGES[6:])


def test_row_groups_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    path = write("parquet", tmp_path)
    monkeypatch.setattr("biggan.data.parquet._MAX_GROUP_BYTES", 1000)
    with pytest.raises(UserError, match="row groups of .* row_group_size=100"):
        open_source(path)


def test_few_row_groups_are_kept_and_each_is_read_once_in_order(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    from biggan.data import parquet

    reads, read = [], parquet._Shard.read
    monkeypatch.setattr(parquet._Shard, "read", lambda self, group: reads.append(group) or read(self, group))
    monkeypatch.setattr(parquet, "_CACHED_BYTES", 0)
    path = parquet_file(tmp_path / "a.parquet", image_formats.parquet_table(IMAGES, LABELS), row_group_size=1)
    for record in open_source(path):
        record.open()
        record.open()
    assert reads == list(range(12))


def test_shards_of_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    path = write("parquet_shards", tmp_path)
    shutil.copy(path / "train-00000-of-00002.parquet", path / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"holds the splits test, train: choose one, as in .*parquet_shards/train"):
        open_source(path)
    assert len(open_source(path / "train")) == 12 and len(open_source(path / "test")) == 6
    with pytest.raises(UserError, match="validation does not exist"):
        open_source(path / "validation")
    other = image_formats.parquet_table(IMAGES, LABELS, class_names=["a", "b", "c"])
    parquet_file(path / "train-00002-of-00002.parquet", other)
    with pytest.raises(UserError, match="train-00002-of-00002.parquet has other columns or classes than"):
        open_source(path / "train")
