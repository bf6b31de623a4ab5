"""open_images and tools.prepare_images: damaged files, memory maps, packed files, and the data sets at hand."""

import io
import json
import struct
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from biggan.data import open_images
from biggan.data.packed import read_packed, write_packed
from runtime.cli import run_command
from runtime.errors import UserError
from runtime.progress import track
from tools import prepare_images

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def jpeg(seed, size=(40, 48)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """60 good photographs in two classes."""
    for index in range(60):
        path = tmp_path / "photos" / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(index))
    return tmp_path / "photos"


def damage(folder, count):
    """Cuts the first `count` files short; returns their names."""
    names = [f"{'ab'[index % 2]}/{index}.jpg" for index in range(count)]
    for name in names:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    return names


def test_a_folder_in_memory(folder):
    dataset = open_images(folder, 16, progress=False)
    assert dataset.images.shape == (60, 3, 16, 16) and dataset.images.dtype == torch.uint8
    assert dataset.class_names == ["a", "b"] and dataset.labels.tolist() == [0] * 30 + [1] * 30
    assert dataset.source == str(folder)


def test_threads_do_not_change_the_result(folder):
    one, four = (open_images(folder, 16, workers=workers, progress=False) for workers in (1, 4))
    assert torch.equal(one.images, four.images) and one.fingerprint == four.fingerprint


def test_without_labels(folder):
    dataset = open_images(folder, 16, labels=False, progress=False)
    assert dataset.num_classes == 1 and dataset.labels.sum() == 0


def test_fingerprint_changes_with_resolution_and_files(folder):
    first = open_images(folder, 16, progress=False).fingerprint
    assert open_images(folder, 16, progress=False).fingerprint == first
    assert open_images(folder, 8, progress=False).fingerprint != first
    (folder / "a" / "0.jpg").unlink()
    assert open_images(folder, 16, progress=False).fingerprint != first


def test_damaged_images_are_named_and_left_out(folder):
    whole = open_images(folder, 16, progress=False)
    damage(folder, 2)
    with pytest.warns(UserWarning, match=r"left out 2 damaged of 60 images.*a/0\.jpg \(.*[Tt]runcated.*b/1\.jpg \("):
        dataset = open_images(folder, 16, progress=False)
    keep = [index for index in range(60) if index not in (0, 30)]  # the first image of either class
    assert torch.equal(dataset.images, whole.images[keep]) and torch.equal(dataset.labels, whole.labels[keep])


def test_ten_damaged_images_are_forgiven_and_eleven_are_not(folder):
    damage(folder, 10)
    with pytest.warns(UserWarning, match="left out 10 damaged"):
        assert len(open_images(folder, 16, progress=False)) == 50
    damage(folder, 11)
    with pytest.raises(UserError, match=r"too many damaged images among the 60 in .*a/0\.jpg .* and 1 more"):
        open_images(folder, 16, progress=False)


def test_small_sets_need_two_thirds_of_their_images(tmp_path):
    for index in range(4):
        (tmp_path / f"{index}.jpg").write_bytes(jpeg(index) if index else b"broken")
    with pytest.warns(UserWarning, match=r"0\.jpg \(not an image of a known format\)"):
        assert len(open_images(tmp_path, 8, progress=False)) == 3
    (tmp_path / "1.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match="too many damaged"):
        open_images(tmp_path, 8, progress=False)


def test_the_share_of_damaged_images_can_be_chosen(folder):
    damage(folder, 1)
    with pytest.raises(UserError, match="too many damaged"):
        open_images(folder, 16, progress=False, max_damaged_fraction=0.0)
    damage(folder, 30)
    with pytest.warns(UserWarning, match="left out 30"):
        assert len(open_images(folder, 16, progress=False, max_damaged_fraction=0.5)) == 30


def test_nothing_but_damaged_images_is_an_error_at_any_share(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match="damaged"):
        open_images(tmp_path, 8, progress=False, max_damaged_fraction=1.0)


def test_large_sets_are_mapped_and_found_again(folder, tmp_path, monkeypatch):
    damage(folder, 1)
    with pytest.warns(UserWarning, match="left out 1"):
        in_memory = open_images(folder, 16, progress=False)
    cache = tmp_path / "cache"
    with pytest.warns(UserWarning, match="left out 1"):
        mapped = open_images(folder, 16, cache_dir=cache, in_memory_bytes=0, progress=False)
    assert [path.name for path in cache.iterdir()] == [f"{in_memory.fingerprint}.safetensors"]

    monkeypatch.setattr("biggan.data.loading.write_decoded", None)  # a second decoding would call it
    again = open_images(folder, 16, cache_dir=cache, in_memory_bytes=0, progress=False)
    for dataset in (mapped, again):
        assert torch.equal(dataset.images, in_memory.images) and torch.equal(dataset.labels, in_memory.labels)
        assert (dataset.fingerprint, dataset.class_names) == (in_memory.fingerprint, in_memory.class_names)
        assert torch.equal(dataset.batch(3, 90, 1, True)[0], in_memory.batch(3, 90, 1, True)[0])


def test_several_that_fill_one_cache_at_once_do_not_disturb_each_other(folder, tmp_path):
    def fill(_):
        return open_images(folder, 16, cache_dir=tmp_path / "cache", in_memory_bytes=0, progress=False)

    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(fill, range(4)))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    expected = open_images(folder, 16, progress=False).images
    assert all(torch.equal(dataset.images, expected) for dataset in datasets)


def test_a_failed_decoding_leaves_no_file(folder, tmp_path):
    damage(folder, 30)
    with pytest.raises(UserError):
        open_images(folder, 16, cache_dir=tmp_path / "cache", in_memory_bytes=0, progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_too_little_space_is_known_before_decoding(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="GiB free; the images need"):
        open_images(folder, 16, cache_dir=tmp_path / "cache", in_memory_bytes=0, progress=False)


def prepare(*arguments):
    return run_command(prepare_images.main, [str(argument) for argument in arguments])


def test_prepare_images_round_trip(folder, tmp_path, capsys):
    damage(folder, 1)
    out = tmp_path / "made" / "photos.safetensors"
    assert prepare(folder, out, "--size", 32) == 0
    captured = capsys.readouterr()
    assert "59 images of 32 x 32, 2 classes" in captured.out
    assert "a/0.jpg" in captured.err and "Traceback" not in captured.err
    with pytest.warns(UserWarning):
        direct = open_images(folder, 32, progress=False)
    packed = open_images(out, 32, progress=False)
    assert torch.equal(packed.images, direct.images) and torch.equal(packed.labels, direct.labels)
    assert (packed.class_names, packed.fingerprint) == (direct.class_names, direct.fingerprint)
    assert open_images(out, 32, labels=False, progress=False).num_classes == 1
    with safe_open(out, "pt") as file:  # readable by anyone
        assert set(file.keys()) == {"images", "labels"} and file.metadata()["resize_rule"] == "center-crop-lanczos"


def test_a_packed_file_at_other_resolutions(folder, tmp_path):
    out = tmp_path / "photos.safetensors"
    assert prepare(folder, out, "--size", 32) == 0
    smaller = open_images(out, 8, progress=False)
    original = open_images(out, 32, progress=False)
    image = Image.fromarray(original.images[7].permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(smaller.images[7], np.asarray(image).transpose(2, 0, 1))
    assert torch.equal(smaller.labels, original.labels) and smaller.fingerprint != original.fingerprint
    with pytest.raises(UserError, match="holds images of 32 pixels"):
        open_images(out, 64)
    assert prepare(out, tmp_path / "small.safetensors", "--size", 8) == 0
    assert torch.equal(open_images(tmp_path / "small.safetensors", 8).images, smaller.images)


@pytest.mark.parametrize("resolution", [5, 6, 8])
def test_packed_files_of_odd_sizes(folder, tmp_path, resolution):
    out = tmp_path / "photos.safetensors"
    (folder / "a" / "0.jpg").unlink()  # an odd number of them
    assert prepare(folder, out, "--size", resolution) == 0
    packed = open_images(out, resolution)
    assert torch.equal(packed.images, open_images(folder, resolution, progress=False).images)
    assert packed.labels.tolist() == [0] * 29 + [1] * 30


def test_a_packed_file_of_far_fewer_images_than_expected(tmp_path):
    image = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    named = {"class_names": ["x", "y"], "source": "test", "fingerprint": "f"}
    assert write_packed(tmp_path / "p.safetensors", [(image, 1)], capacity=10**6, resolution=4, **named) == 1
    packed = read_packed(tmp_path / "p.safetensors")
    assert np.array_equal(packed.images[0], image) and packed.labels.tolist() == [1]


def test_cut_and_foreign_packed_files(folder, tmp_path):
    out = tmp_path / "photos.safetensors"
    assert prepare(folder, out, "--size", 16) == 0
    data = out.read_bytes()
    for length in (0, 5, 100, len(data) // 2, len(data) - 1):
        out.write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged or cut short"):
            open_images(out, 16)
    header = json.dumps({"weights": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    out.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(UserError, match="holds no images"):
        read_packed(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out.safetensors"], "does not exist"),
        ([".", "out.npz"], "must be named"),
        ([".", "out.safetensors", "--size", "0"], "at least 1"),
        ([".", "out.safetensors", "--sise", "8"], "--size"),
        ([], "required"),
        (["empty", "out.safetensors"], "no images in empty"),
    ],
)
def test_wrong_use_of_prepare_images(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert prepare(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") <= 2
    assert not list(tmp_path.glob("*.safetensors"))


def test_wrong_resolution():
    with pytest.raises(ValueError, match="resolution"):
        open_images(".", 0)


def test_progress_is_plain_lines_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("runtime.progress._SECONDS_BETWEEN_LINES", 0)
    assert list(track("abc", 3, "decoding")) == list("abc")
    assert capsys.readouterr().err.splitlines()[-1].startswith("decoding: 3 of 3, ")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(track("abc", 3, "decoding")) == list("abc")
    assert "3/3" in capsys.readouterr().err
    list(track("abc", 3, "decoding", enabled=False))
    assert capsys.readouterr().err == ""


def first_members(archive, out, names):
    """A zip of some members of a zip."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(out, "w") as target:
        for name in names:
            target.writestr(name, source.read(name))
    return out


@pytest.mark.skipif(not (SHARED / "faces128.zip").exists(), reason="needs ../shared/data/faces128.zip")
def test_real_faces(tmp_path):
    path = first_members(SHARED / "faces128.zip", tmp_path / "f.zip", [f"faces128/{i}.jpg" for i in range(0, 1000, 5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = open_images(path, 64, progress=False)
    assert dataset.images.shape == (200, 3, 64, 64) and dataset.class_names == ["all"]
    assert 60 < dataset.images.float().mean() < 200 and dataset.images.float().std() > 30


@pytest.mark.skipif(not (SHARED / "cifar10.zip").exists(), reason="needs ../shared/data/cifar10.zip")
def test_real_classes():
    with pytest.raises(UserError, match=r"splits test, train: choose one, as in .*cifar10\.zip/train"):
        open_images(SHARED / "cifar10.zip", 32)
    dataset = open_images(SHARED / "cifar10.zip" / "test" / "cat", 32, progress=False)
    assert len(dataset) == 1000 and dataset.num_classes == 1
