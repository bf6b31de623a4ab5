"""open_task: packed once, mapped, cut and padded; held-out examples; packed files that do not fit."""

import os

import numpy as np
import pytest
import torch

from hrrformer.data import open_task
from hrrformer.packed import read_packed, write_packed
from runtime.errors import UserError

REVIEWS = 40


def review(split, label, number):
    return f"{split} {label} {number} ".encode() * (1 + number % 5)


@pytest.fixture
def folder(tmp_path):
    """aclImdb with 40 reviews in each class of each split."""
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            place = tmp_path / "aclImdb" / split / label
            place.mkdir(parents=True)
            for number in range(REVIEWS):
                (place / f"{number}_7.txt").write_bytes(review(split, label, number))
    return tmp_path / "aclImdb"


def open_text(folder, tmp_path, **options):
    return open_task("text", str(folder), cache_dir=tmp_path / "cache", progress=False, **options)


def texts(split):
    """The sequences of a split as bytes."""
    rows = split.rows(np.arange(len(split)), 4000)
    return [bytes((row[row > 0] - 1).tolist()) for row in rows]


def test_rows_are_bytes_plus_one_padded_with_zero(folder, tmp_path):
    data = open_text(folder, tmp_path)
    assert (data.vocab_size, data.num_classes, data.max_length) == (257, 2, 4000)
    assert data.class_names == ("neg", "pos") and data.test.inputs == 1
    expected = [review("test", label, number) for label in ("neg", "pos") for number in range(REVIEWS)]
    assert texts(data.test) == expected
    assert data.test.labels.tolist() == [0] * REVIEWS + [1] * REVIEWS
    rows = data.test.rows(torch.tensor([44, 3]), 20)
    assert rows.dtype == torch.int64 and rows.shape == (2, 20)
    assert rows[0].tolist() == [byte + 1 for byte in review("test", "pos", 4)[:20]]
    assert data.test.lengths[[44, 3], 0].tolist() == [len(review("test", "pos", 4)), len(review("test", "neg", 3))]


def test_zero_bytes_are_no_padding(tmp_path):
    for split in ("train", "test"):
        for label in ("benign", "malware"):
            for number in range(10):
                path = tmp_path / "programs" / split / label / f"{number}.exe"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"\x00\xff\x00")
    data = open_task("malware", str(tmp_path / "programs"), 8, tmp_path / "cache", progress=False)
    assert data.test.rows([0], 5).tolist() == [[1, 256, 1, 0, 0]]


def test_validation_is_a_tenth_of_train_by_seed_and_shares_nothing_with_it(folder, tmp_path):
    data = open_text(folder, tmp_path)
    train, validation = set(texts(data.train)), set(texts(data.validation))
    assert len(validation) == 8 and len(train) == 72 and not train & validation
    again, other = open_text(folder, tmp_path), open_text(folder, tmp_path, seed=1)
    assert texts(again.validation) == texts(data.validation) != texts(other.validation)
    assert again.train.fingerprint == data.train.fingerprint != other.train.fingerprint


def test_validation_may_be_the_test_split_as_in_the_original(folder, tmp_path):
    data = open_text(folder, tmp_path, validation_is_test=True)
    assert len(data.train) == 80 and texts(data.validation) == texts(data.test)


def test_packed_once_and_again_when_files_or_length_change(folder, tmp_path):
    open_text(folder, tmp_path)
    (packed,) = (tmp_path / "cache").glob("text-*.safetensors")
    before = packed.stat().st_mtime_ns
    open_text(folder, tmp_path)
    assert packed.stat().st_mtime_ns == before and len(list((tmp_path / "cache").iterdir())) == 1
    assert open_text(folder, tmp_path, max_length=10).test.lengths.max() == 10
    (folder / "test" / "pos" / "0_7.txt").write_bytes(b"changed")
    assert b"changed" in texts(open_text(folder, tmp_path).test)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_packed_file_is_data_too_and_shorter_sequences_are_cut_from_it(folder, tmp_path):
    data = open_text(folder, tmp_path)
    (packed,) = (tmp_path / "cache").glob("*.safetensors")
    assert texts(open_task("text", str(packed)).train) == texts(data.train)
    short = open_task("text", str(packed), 12)
    assert short.train.lengths.max() == 12 and short.train.fingerprint != data.train.fingerprint
    with pytest.raises(UserError, match="holds the task text, not malware"):
        open_task("malware", str(packed))
    with pytest.raises(UserError, match="holds sequences of 4000 tokens, not 5000"):
        open_task("text", str(packed), 5000)


def test_a_failed_packing_leaves_nothing(folder, tmp_path):
    for file in (folder / "test" / "pos").iterdir():
        os.chmod(file, 0o644)
        file.unlink()
    with pytest.raises(UserError, match="the class pos is empty"):
        open_text(folder, tmp_path)
    assert not list(tmp_path.glob("cache/*"))


def test_a_file_cut_short_is_called_damaged(folder, tmp_path):
    open_text(folder, tmp_path)
    (packed,) = (tmp_path / "cache").glob("*.safetensors")
    whole = packed.read_bytes()
    for size in (100, len(whole) - 8):
        packed.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged or cut short"):
            read_packed(packed)


def test_a_file_whose_lengths_or_labels_do_not_fit(tmp_path):
    description = {"task": "text", "max_length": 9, "first_id": 1, "source": "x", "fingerprint": "x"}
    examples = [((b"abc",), 0), ((b"abc",), 2)]
    write_packed(tmp_path / "a.safetensors", {"train": examples}, description | {"class_names": ("neg", "pos")})
    with pytest.raises(UserError, match="labels in its train split have no class"):
        read_packed(tmp_path / "a.safetensors")
    write_packed(tmp_path / "a.safetensors", {"test": examples}, description | {"class_names": ("a", "b", "c")})
    with pytest.raises(UserError, match="it has no training examples"):
        read_packed(tmp_path / "a.safetensors")
    write_packed(tmp_path / "a.safetensors", {"train": examples}, description | {"class_names": ("a", "b", "c")})
    whole = (tmp_path / "a.safetensors").read_bytes()
    changed = whole.replace(np.array([3, 3], "<i8").tobytes(), np.array([3, 30], "<i8").tobytes())
    (tmp_path / "a.safetensors").write_bytes(changed)
    with pytest.raises(UserError, match="the lengths in its train split do not fit"):
        read_packed(tmp_path / "a.safetensors")


def test_any_safetensors_file_is_not_taken_for_a_task(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="holds no sequences"):
        open_task("text", str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ("texts", "", "unknown task 'texts'; tasks are listops, text, retrieval, image, pathfinder, pathx, malware"),
        ("text", "", r"needs its files \(--data PATH\).*ai.stanford.edu"),
        ("retrieval", "generated", "new_aan_pairs.train.tsv.*long-range-arena"),
        ("text", "/does/not/exist", "/does/not/exist does not exist. text reads the folder aclImdb"),
        ("text", "/does/not/exist.safetensors", "does not exist"),
    ],
)
def test_what_is_missing_and_where_to_get_it(task, data, message):
    with pytest.raises(UserError, match=message):
        open_task(task, data)


def test_generated_sets_need_no_files(tmp_path):
    data = open_task("image", "", 64, tmp_path, progress=False, workers=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (20_000, 2_000, 2_000)
    assert data.train.rows([0], 64).shape == (1, 64) and data.num_classes == 10
    shares = np.bincount(data.test.labels, minlength=10) / len(data.test)
    assert shares.min() > 0.07 and shares.max() < 0.13
