"""Checkpoints: whole or not there, verified, and never a way to run code."""

import hashlib
import os
import pickle
import threading
import warnings

import pytest
import torch

from runtime import checkpoint
from runtime.errors import UserError


def tree():
    return {
        "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)},
        "step": 7,
        "x": [1, "y"],
    }


def test_round_trip_with_plain_torch_load(tmp_path):
    checkpoint.save(tmp_path / "c.pt", tree(), "test")
    loaded = checkpoint.load(tmp_path / "c.pt", "test")
    assert (
        torch.equal(loaded["weights"]["a"], tree()["weights"]["a"]) and loaded["step"] == 7 and loaded["x"] == [1, "y"]
    )
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 7
    assert os.listdir(tmp_path) == ["c.pt"]


def test_every_truncation_and_bit_flip_is_noticed(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, tree(), "test")
    whole = path.read_bytes()
    flips = torch.randint(len(whole), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    mutants = [whole[: len(whole) * i // 20] for i in range(20)]
    mutants += [whole[:i] + bytes([whole[i] ^ 64]) + whole[i + 1 :] for i in flips]
    for mutant in mutants:
        path.write_bytes(mutant)
        try:
            loaded = checkpoint.load(path, "test")
        except UserError:
            continue
        # A flip in the padding or in the archive's own bookkeeping changes no content.
        assert torch.equal(loaded["weights"]["a"], tree()["weights"]["a"]) and loaded["step"] == 7


def test_changed_weights_do_not_pass_the_checksum(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, tree(), "test")
    content = torch.load(path, weights_only=True)
    content["weights"]["a"][0, 0] += 1
    torch.save(content, path)
    with pytest.raises(UserError, match="checksum"):
        checkpoint.load(path, "test")


def test_the_sum_tells_types_and_where_values_end():
    trees = [[1, 23], [12, 3], (1, 23), [[1, 2], 3], [1, [2, 3]], ["1", 23], [1.0, 23], [True, 23]]
    trees += [{"a": 1}, {"a": torch.tensor(1)}, {"a": torch.tensor([1])}, {"a": torch.tensor(1, dtype=torch.int32)}]
    assert len({checkpoint.checksum(tree) for tree in trees}) == len(trees)


def test_checkpoints_from_before_sums_told_types_are_read(tmp_path):
    content = tree() | {"format": "test", "versions": {}}
    words = "{5'format''test''step'7'versions'{0'weights'{2'a'torch.float32(2, 3)"
    digest = hashlib.sha256(words.encode() + tree()["weights"]["a"].numpy().tobytes())
    digest.update(b"'b'torch.bfloat16(3,)" + tree()["weights"]["b"].view(torch.uint8).numpy().tobytes() + b"'x'[21'y'")
    torch.save(content | {"checksum": digest.hexdigest()}, tmp_path / "old.pt")
    assert checkpoint.load(tmp_path / "old.pt", "test")["step"] == 7
    torch.save(content | {"checksum": digest.hexdigest(), "step": 8}, tmp_path / "old.pt")
    with pytest.raises(UserError, match="checksum"):
        checkpoint.load(tmp_path / "old.pt", "test")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, write):
    path, marker = tmp_path / "c.pt", tmp_path / "marker"
    write({"weights": Malicious(marker), "format": "test"}, path)
    with pytest.raises(UserError, match="c.pt"):
        checkpoint.load(path, "test")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(tmp_path / "c.pt", "test")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "missing.pt", "test")


def test_another_programs_files_are_named_as_such(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "plain.pt")
    checkpoint.save(tmp_path / "other.pt", tree(), "other")
    with pytest.raises(UserError, match="convert_biggan"):
        checkpoint.load(tmp_path / "plain.pt", "test")
    with pytest.raises(UserError, match="'other'"):
        checkpoint.load(tmp_path / "other.pt", "test")


def test_folder_keeps_the_newest_and_passes_over_a_damaged_one(tmp_path):
    folder = checkpoint.CheckpointFolder(tmp_path / "run", "test", keep=2)
    assert folder.load_newest() is None
    for step in (5, 10, 15):
        folder.save(step, {**tree(), "step": step})
    assert [p.name for p in folder.paths()] == ["step-00000010.pt", "step-00000015.pt"]
    newest = folder.paths()[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="step-00000015"):
        path, loaded = folder.load_newest()
    assert loaded["step"] == 10 and path.name == "step-00000010.pt"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder.load_newest()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    checkpoint.save(path, tree(), "test")
    before = path.read_bytes()

    def no_space(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {**tree(), "step": 8}, "test")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.pt"]


class FullDisk:
    """A file that runs out of space: torch's writer then raises a RuntimeError of its own."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        raise OSError(28, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_torchs_own_error_for_a_full_disk_becomes_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"cannot write|No space"):
        checkpoint.write_atomically(tmp_path / "c.pt", lambda file: torch.save(tree(), FullDisk(file)))
    assert not list(tmp_path.iterdir())


def test_background_saves_hold_what_was_there_when_they_began(tmp_path, monkeypatch):
    may_write, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: may_write.wait(10) and fsync(handle))
    folder = checkpoint.CheckpointFolder(tmp_path, "test")
    saver, weights = checkpoint.BackgroundSaver(folder), torch.zeros(3)
    saver.save(1, {"weights": weights})
    assert not folder.paths()  # the disk is still busy, and we are not waiting for it
    weights.add_(1)
    may_write.set()
    saver.wait()
    path, loaded = folder.load_newest()
    assert path.name == "step-00000001.pt" and torch.equal(loaded["weights"], torch.zeros(3))


def test_background_saves_that_fail_say_so_at_the_next_save(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    saver = checkpoint.BackgroundSaver(checkpoint.CheckpointFolder(tmp_path, "test"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        saver.save(1, tree())
        saver.thread.join()
    with pytest.raises(OSError, match="No space left"):
        saver.save(2, tree())
    saver.save(3, tree())
    saver.wait()
    assert [path.name for path in saver.folder.paths()] == ["step-00000003.pt"]
