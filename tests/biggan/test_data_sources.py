"""Folders and zips: which files are images, their order and classes, and what is said where there are none."""

import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from biggan.data.decode import DamagedImage
from biggan.data.listing import class_folders, images_among
from biggan.data.sources import open_source
from runtime.errors import UserError


def png(value=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = ["b/10.png", "b/2.png", "a/1.png", "a/deep/0.PNG", "a/.hidden.png", "notes.txt", ".cache/3.png"]


@pytest.fixture(params=["folder", "zip", "folder in zip"])
def make(request, tmp_path):
    """make(names) -> path of a folder or zip with these files; every image holds its place in the list as its grey."""

    def build(names):
        contents = {name: png(place) if name.lower().endswith("png") else b"text" for place, name in enumerate(names)}
        if request.param == "folder":
            root = tmp_path / "images"
            root.mkdir()
            for name, data in contents.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(data)
            return root
        inside = "some/where/" if request.param == "folder in zip" else ""
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for name, data in contents.items():
                archive.writestr(inside + name, data)
            archive.writestr("__MACOSX/a/._1.png", b"resource fork")
        return tmp_path / "images.zip" / inside if inside else tmp_path / "images.zip"

    return build


def listing(source):
    return [(record.name, record.label) for record in source]


def test_folders_are_classes_and_order_is_natural(make):
    source = open_source(make(FILES))
    assert listing(source) == [("a/1.png", 0), ("a/deep/0.PNG", 0), ("b/2.png", 1), ("b/10.png", 1)]
    assert source.class_names == ["a", "b"] and len(source) == 4
    assert [record.open().getpixel((0, 0))[0] for record in source] == [2, 3, 1, 0]


def test_a_flat_set_is_one_class(make):
    source = open_source(make([f"{index}.png" for index in (11, 2, 100, 1)]))
    assert listing(source) == [("1.png", 0), ("2.png", 0), ("11.png", 0), ("100.png", 0)]
    assert source.class_names == ["all"]


def test_celeba_hq_takes_its_images_and_not_its_masks(make):
    names = ["CelebA-HQ-img/10.png", "CelebA-HQ-img/9.png", "CelebAMask-HQ-mask-anno/0/00000_hair.png"]
    source = open_source(make([f"CelebAMask-HQ/{name}" for name in names]))
    assert [Path(record.name).name for record in source] == ["9.png", "10.png"]
    assert source.class_names == ["all"]


def test_no_images_says_what_was_looked_for_and_found(make):
    with pytest.raises(UserError, match=r"no images in .*looked for \.bmp .*\.webp; found 2 \.npy, 1 \.txt"):
        open_source(make(["a.npy", "x/b.npy", "c.txt"]))


def test_splits_are_not_classes(make):
    path = make(["train/cat/1.png", "train/dog/1.png", "test/cat/1.png"])
    with pytest.raises(UserError, match="holds the splits test, train: choose one, as in .*/train"):
        open_source(path)
    assert open_source(path / "train").class_names == ["cat", "dog"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_hash_follows_names_labels_and_contents(make):
    path = make(FILES)
    first = open_source(path).listing_hash
    assert first == open_source(path).listing_hash
    if path.is_dir():
        (path / "b/2.png").write_bytes(png(200) + b"x")
    else:
        archive = next(parent for parent in (path, *path.parents) if parent.is_file())
        with zipfile.ZipFile(archive, "a") as opened:
            opened.writestr(f"{path.relative_to(archive).as_posix()}/b/2.png".removeprefix("./"), png(200))
    assert open_source(path).listing_hash != first


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["x/1.jpg", "x/2.jpg"], [0, 0], ["all"]),
        (["data/x/1.jpg", "data/y/1.jpg"], [0, 1], ["x", "y"]),
        (["x/p/1.jpg", "x/q/1.jpg"], [0, 1], ["p", "q"]),
        (["2/1.jpg", "10/1.jpg"], [0, 1], ["2", "10"]),
        (["t/00000/00000.png", "t/00000/00999.png", "t/69000/69001.png"], [0, 0, 0], ["all"]),  # FFHQ
        (["00000/00000.png", "01000/00999.png"], [0, 1], ["00000", "01000"]),
        (["1000/1001.png", "2000/front/2001.png"], [0, 1], ["1000", "2000"]),
    ],
)
def test_class_folders(names, labels, classes):
    assert class_folders(names, "root") == (labels, classes)


def test_loose_images_beside_class_folders_are_reported():
    with pytest.warns(UserWarning, match="1 images lie beside the 2 folders"):
        assert class_folders(["a/1.jpg", "b/1.jpg", "preview.jpg"], "root") == ([0, 0, 0], ["all"])


def test_natural_order_survives_odd_names():
    names = ["9" * 5000 + ".png", "٣.png", "10.png", "010.png", "2.png", "a1b2.png", "a1b10.png", "a2b1.png", "1/2.png"]
    ordered = images_among(reversed(names), "root")
    assert sorted(ordered) == sorted(names)
    assert [name for name in ordered if name[0] == "a"] == ["a1b2.png", "a1b10.png", "a2b1.png"]
    assert ordered.index("2.png") < ordered.index("10.png") < ordered.index(names[0])


def test_missing_path():
    with pytest.raises(UserError, match="does not exist"):
        open_source(Path("/nowhere/faces"))


def test_other_files_and_cut_zips(tmp_path):
    (tmp_path / "face.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match="neither a folder"):
        open_source(tmp_path / "face.jpg")
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        archive.writestr("1.png", png())
    data = (tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) - 30])
    with pytest.raises(UserError, match="cut.zip is damaged or cut short"):
        open_source(tmp_path / "cut.zip")
    with pytest.raises(UserError, match="has no folder 'train'; it has no folders"):
        open_source(tmp_path / "whole.zip" / "train")


def test_empty_folder_and_empty_zip(tmp_path):
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "empty.zip"):
        with pytest.raises(UserError, match="no images in .*found no files at all"):
            open_source(path)


def test_a_damaged_member_of_a_zip_is_a_damaged_image(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", png(1))
        archive.writestr("2.png", png(2))
    data = bytearray(path.read_bytes())
    data[45:60] = bytes(15)  # in the compressed bytes of 1.png
    path.write_bytes(data)
    first, second = open_source(path)
    with pytest.raises(DamagedImage):
        first.open()
    assert second.open().size == (8, 8)


def test_names_that_climb_out_of_a_zip_write_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../climbed.png", png())
        archive.writestr("windows\\1.png", png())
    before = sorted(tmp_path.rglob("*"))
    assert len([record.open() for record in open_source(path)]) in (1, 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_zip_bombs_are_not_inflated(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", png())
    data = path.read_bytes()
    size = len(png()).to_bytes(4, "little")
    path.write_bytes(data.replace(size, (0xF0000000).to_bytes(4, "little")))
    with pytest.raises(DamagedImage, match="too many for one image"):
        next(iter(open_source(path))).open()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_links_and_pipes(tmp_path):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.png").write_bytes(png())
    (root / "a" / "loop").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.png").write_bytes(png())
    (root / "linked" / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(root / "a" / "pipe.png")
    records = list(open_source(root))
    assert [record.name for record in records] == ["a/1.png", "linked/2.png", "linked/gone.png"]
    with pytest.raises(OSError):
        records[2].open()


def test_records_may_be_opened_from_several_threads_at_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for index in range(100):
            archive.writestr(f"{index}.png", png(index))
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda record: np.asarray(record.open())[0, 0, 0], open_source(tmp_path / "images.zip")))
    assert values == list(range(100))
