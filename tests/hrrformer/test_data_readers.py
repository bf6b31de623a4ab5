"""The files of text, retrieval, image and malware: what is read from them, and what is said of bad ones."""

import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hrrformer.data import open_task
from hrrformer.tasks.digits import draw_digits
from hrrformer.tasks.image import CIFAR_CLASSES
from hrrformer.tasks.pixels import grey
from runtime.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def read(tmp_path):
    def open_with_cache(task, path, max_length=0, **options):
        options = {"workers": 1, "progress": False} | options
        return open_task(task, str(path), max_length, tmp_path / "cache", **options)

    return open_with_cache


def content(split, index, length=64):
    """The bytes of an example of a byte task."""
    return [bytes((row[row > 0] - 1).tolist()) for row in split.rows([index], length).reshape(-1, length)]


# Text


def write_tar(path, names, data=b"fine film"):
    with tarfile.open(path, "w:" + path.suffix[1:]) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(data) + len(name)
            archive.addfile(info, io.BytesIO(data + name.encode()))
    return path


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_an_archive_reads_like_the_folder_it_holds(tmp_path, read, suffix):
    numbers = (10, 9, 0, *range(20, 40))
    names = [f"aclImdb/{s}/{c}/{i}_1.txt" for s in ("test", "train") for c in ("pos", "neg") for i in numbers]
    others = ["aclImdb/README", "aclImdb/train/unsup/1_0.txt", "aclImdb/train/urls_neg.txt"]
    path = write_tar(tmp_path / f"aclImdb.tar.{suffix}", [*others, *names])
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    packed, unpacked = read("text", path), read("text", tmp_path / "aclImdb")
    for split in ("train", "validation", "test"):
        one, other = getattr(packed, split), getattr(unpacked, split)
        assert np.array_equal(one.rows(np.arange(len(one)), 64), other.rows(np.arange(len(other)), 64))
        assert one.labels.tolist() == other.labels.tolist()
    assert content(packed.test, 1) == [b"fine filmaclImdb/test/neg/9_1.txt"]  # 0, 9, 10, ...


def test_text_that_is_not_there(tmp_path, read):
    path = write_tar(tmp_path / "aclImdb.tar.gz", ["aclImdb/train/pos/0_1.txt"])
    with pytest.raises(UserError, match="has no .txt files in train/neg"):
        read("text", path)
    for part in (path.read_bytes()[:60], b"no archive"):
        path.write_bytes(part)
        with pytest.raises(UserError, match="is no tar archive, damaged, or cut short. Needed: the folder aclImdb"):
            read("text", path)
    (tmp_path / "aclImdb" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="aclImdb has no test. Needed: the folder aclImdb with"):
        read("text", tmp_path / "aclImdb")
    (tmp_path / "aclImdb" / "test").mkdir()
    with pytest.raises(UserError, match="train/neg is missing"):
        read("text", tmp_path / "aclImdb")


# Retrieval


@pytest.fixture
def pairs(tmp_path):
    folder = tmp_path / "tsv_data"
    folder.mkdir()
    for split in ("train", "eval", "test"):
        rows = [f'{i % 2}.0\tA{i}\tB{i}\t"{split} {i}, quoted\tsecond {i}' for i in range(6)]
        (folder / f"new_aan_pairs.{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


def test_pairs_have_two_inputs_and_no_quoting(tmp_path, pairs, read):
    data = read("retrieval", tmp_path)
    assert len(data.train) == len(data.validation) == len(data.test) == 6
    assert data.train.inputs == 2 and data.train.lengths.shape == (6, 2)
    assert data.train.rows([0, 1, 2], 30).shape == (3, 2, 30)
    assert content(data.validation, 3) == [b'"eval 3, quoted', b"second 3"]
    assert data.validation.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert content(read("retrieval", pairs, 4).test, 0) == [b'"tes', b"seco"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "1.0\tA\tB\ttext",
            "eval.tsv, line 3: found 4 columns parted by tabs, expected 5: label, id1, id2, text1, text2",
        ),
        ("1.0\tA\tB\ttext\ttext\tmore", "line 3: found 6 columns"),
        ("2.0\tA\tB\ttext\ttext", "line 3: the label must be 0.0 or 1.0, found '2.0'"),
        ("yes\tA\tB\ttext\ttext", "line 3: the label must be 0.0 or 1.0, found 'yes'"),
    ],
)
def test_a_bad_pair_is_named_by_its_line(pairs, read, row, message):
    file = pairs / "new_aan_pairs.eval.tsv"
    rows = file.read_text().splitlines()
    rows[2] = row
    file.write_text("\n".join(rows))
    with pytest.raises(UserError, match=message):
        read("retrieval", pairs)


def test_a_file_of_one_class_only(pairs, read):
    (pairs / "new_aan_pairs.train.tsv").write_text("1.0\tA\tB\tx\ty\n" * 4)
    with pytest.raises(UserError, match="no example of class unrelated in the train split"):
        read("retrieval", pairs)
    (pairs / "new_aan_pairs.train.tsv").write_text("")
    with pytest.raises(UserError, match="no examples in the train split"):
        read("retrieval", pairs)


# Image


def test_grey_is_the_formula_of_the_benchmark():
    rgb = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    rgb[0, 0], rgb[0, 1] = 255, 0
    exact = np.floor(255.5 * (rgb.astype(np.float64) @ [0.2989, 0.5870, 0.1140]) / 255 + 1e-9)
    assert np.array_equal(grey(rgb), exact) and grey(rgb)[0, 0] == 255
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    assert np.array_equal(grey(ramp), np.arange(256))


def write_cifar(folder, extra=None):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = [i % 10 for i in range(20)]
        content = {b"data": pixels, b"labels": labels} | (extra or {})
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return pixels


def test_cifar_as_torchvision_lays_it_out(tmp_path, read):
    pixels = write_cifar(tmp_path / "cifar-10-batches-py")
    data = read("image", tmp_path)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [90, 10, 20]
    assert data.class_names[3] == "cat" and data.vocab_size == 256
    expected = grey(pixels[7].reshape(3, 32, 32).transpose(1, 2, 0)).reshape(-1)
    assert data.test.rows([7], 1024)[0].tolist() == expected.tolist()
    assert len(read("image", tmp_path / "cifar-10-batches-py").test) == 20


class Harmful:
    def __reduce__(self):
        return (print, ("a program that a file ran",))


@pytest.mark.parametrize("harmful", [Harmful(), Path("x"), io.StringIO])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, read, capsys, harmful):
    write_cifar(tmp_path / "cifar-10-batches-py", {b"more": harmful})
    with pytest.raises(UserError, match="data_batch_1 is not a sound CIFAR-10 batch: it names"):
        read("image", tmp_path)
    assert not capsys.readouterr().out


def test_damaged_and_missing_batches(tmp_path, read):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder)
    (folder / "data_batch_2").write_bytes((folder / "data_batch_2").read_bytes()[:1000])
    with pytest.raises(UserError, match="data_batch_2 is not a sound CIFAR-10 batch"):
        read("image", tmp_path)
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": np.zeros((3, 5), np.uint8), "labels": [0, 1, 2]}))
    with pytest.raises(UserError, match="rows of 3072"):
        read("image", tmp_path)
    (folder / "test_batch").unlink()
    with pytest.raises(UserError, match="has no test_batch. Needed: cifar-10-batches-py"):
        read("image", tmp_path)


def write_classes(folder, side=8, classes=("cat", "dog"), number=10):
    generator = np.random.default_rng(1)
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def write_zip(path, folder):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, f"set/{file.relative_to(folder)}")
    return path


def test_class_folders_and_a_zip_of_them_with_any_number_of_workers(tmp_path, read):
    folder = write_classes(tmp_path / "set")
    one, two = read("image", folder, 64), read("image", write_zip(tmp_path / "set.zip", folder), 64, workers=2)
    assert one.class_names == two.class_names == ("cat", "dog") and one.num_classes == 2
    assert [len(split) for split in (one.train, one.validation, one.test)] == [18, 2, 20]
    for split in ("train", "validation", "test"):
        rows = [getattr(data, split).rows(np.arange(2), 64).tolist() for data in (one, two)]
        assert rows[0] == rows[1]
    expected = grey(np.asarray(Image.open(folder / "test" / "dog" / "2.png"))).reshape(-1)
    assert one.test.rows([12], 64)[0].tolist() == expected.tolist() and one.test.labels[12] == 1


def test_images_of_another_size_are_resized(tmp_path, read):
    data = read("image", write_classes(tmp_path / "set", side=20), 64)
    assert data.test.lengths.max() == data.test.lengths.min() == 64
    with pytest.raises(UserError, match="pixels of a square picture .* not 60"):
        read("image", tmp_path / "set", 60)


def test_images_that_are_not(tmp_path, read):
    folder = write_classes(tmp_path / "set")
    bad = folder / "train" / "dog" / "3.png"
    whole = bad.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"text", b""):
        bad.write_bytes(damaged)
        with pytest.raises(UserError, match="train/dog/3.png is not a sound image"):
            read("image", folder, 64)
        with pytest.raises(UserError, match="train/dog/3.png is not a sound image"):
            read("image", write_zip(tmp_path / "set.zip", folder), 64, workers=2)


def test_folders_and_zips_that_hold_no_classes(tmp_path, read):
    folder = write_classes(tmp_path / "set")
    for file in (folder / "test" / "dog").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="the classes dog have images in only one of train and test"):
        read("image", folder, 64)
    with pytest.raises(UserError, match="has no folder train. Needed: cifar-10-batches-py"):
        read("image", folder / "test", 64)
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(UserError, match="broken.zip is no sound zip"):
        read("image", tmp_path / "broken.zip", 64)
    write_zip(tmp_path / "flat.zip", folder / "train" / "cat")
    with pytest.raises(UserError, match="no images in train/CLASS/ and test/CLASS/"):
        read("image", tmp_path / "flat.zip", 64)


def test_drawn_digits_are_a_function_of_their_number():
    images, labels = draw_digits(0, 16, range(60))
    other, others = draw_digits(0, 16, range(20, 30))
    assert np.array_equal(images[20:30], other) and np.array_equal(labels[20:30], others)
    assert images.shape == (60, 16, 16) and images.dtype == np.uint8
    assert not np.array_equal(draw_digits(1, 16, range(60))[0], images)
    digits = [draw_digits(0, 32, range(400))[0][draw_digits(0, 32, range(400))[1] == d].mean(0) for d in range(10)]
    differences = [np.abs(a - b).max() for i, a in enumerate(digits) for b in digits[:i]]
    assert min(differences) > 20  # no two digits look alike


# Malware


def write_programs(folder, number=10):
    for split in ("train", "test"):
        for label in ("benign", "malware"):
            for index in range(number):
                place = folder / split / label / f"family{index % 3}"
                place.mkdir(parents=True, exist_ok=True)
                program = f"MZ {split} {label} {index}".encode()
                (place / f"{index}").write_bytes(gzip.compress(program) if index % 2 else program)
    return folder


def test_programs_at_any_depth_gzipped_or_raw(tmp_path, read):
    folder = write_programs(tmp_path / "set")
    data = read("malware", folder)
    assert data.class_names == ("benign", "malware") and data.max_length == 16384
    assert [len(split) for split in (data.train, data.validation, data.test)] == [18, 2, 20]
    found = {(content(data.test, i)[0], int(label)) for i, label in enumerate(data.test.labels)}
    assert found == {(f"MZ test {c} {i}".encode(), k) for k, c in enumerate(("benign", "malware")) for i in range(10)}
    assert content(read("malware", folder, 5, workers=2).test, 0) == [b"MZ te"]


def test_half_a_gzip_is_read_raw_and_empty_files_are_left_out(tmp_path, read):
    folder = write_programs(tmp_path / "set")
    broken = gzip.compress(b"MZ" * 50)[:-20]
    (folder / "test" / "benign" / "family0" / "0").write_bytes(broken)
    (folder / "test" / "malware" / "family1" / "1").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out 1 empty files of 20"):
        data = read("malware", folder)
    assert len(data.test) == 19 and content(data.test, 0) == [broken]


def test_programs_that_are_not_there(tmp_path, read):
    folder = write_programs(tmp_path / "set")
    for file in (folder / "train" / "malware").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(UserError, match="the class malware is empty"):
        read("malware", folder)
    with pytest.raises(UserError, match="found no train in .* Needed: {train,test}/{benign,malware}/"):
        read("malware", folder / "train")


# The data sets at hand


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "aclImdb.tar.xz").exists(), reason="no IMDB")
def test_the_real_reviews(read):
    data = read("text", SHARED / "aclImdb.tar.xz", validation_is_test=True)
    assert len(data.train) == len(data.test) == 25_000
    assert data.train.labels.sum() == data.test.labels.sum() == 12_500
    assert data.train.lengths.max() == 4000 and data.train.lengths.min() >= 32


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar10.zip").exists(), reason="no CIFAR-10")
def test_the_real_pictures(read):
    data = read("image", SHARED / "cifar10.zip", workers=2)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [45_000, 5_000, 10_000]
    assert data.class_names == CIFAR_CLASSES
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
