"""tools.prepare_images: the same file from every format, and from however many interrupted attempts."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import image_formats
import numpy as np
import pytest
from image_formats import NEEDS, WRITERS, example_images, png

from biggan.data import resumable
from biggan.data.packed import read_packed
from biggan.data.sources import open_source
from runtime.cli import run_command
from runtime.errors import RunError
from tools import prepare_images

ROOT = Path(__file__).resolve().parents[2]


def prepare(source, out, *options, size=8):
    return run_command(prepare_images.main, [str(word) for word in (source, out, "--size", size, *options)])


@pytest.fixture
def folder(tmp_path):
    """40 images of three classes, of which three are damaged."""
    images, labels = example_images(40)
    path = image_formats.write_folder(tmp_path / "pets", images, labels)
    for name in ("cat/0.png", "dog/20.png", "dog/21.png"):
        (path / name).write_bytes(b"broken")
    return path


@pytest.fixture
def commit_always(monkeypatch):
    monkeypatch.setattr(resumable, "_SECONDS_BETWEEN_COMMITS", 0)


def left_over(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_packs_to_the_same_images(kind, tmp_path, capsys):
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])
    images, labels = example_images()
    out = tmp_path / "packed.safetensors"
    assert prepare(WRITERS[kind](tmp_path / kind, images, labels), out, size=16) == 0
    packed = read_packed(out)
    assert np.array_equal(packed.images.numpy().transpose(0, 2, 3, 1), images)
    assert packed.num_classes in (1, 3) and (packed.num_classes == 1 or packed.labels.tolist() == labels.tolist())
    assert "12 records = 12 written + 0 damaged" in capsys.readouterr().out
    assert left_over(tmp_path) == []


def kill(source, out, *kills):
    """Statuses of the attempts, and what they said."""
    command = [sys.executable, str(ROOT / "tests/kill_packing.py"), str(source), str(out), "8", *map(str, kills)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(folder, tmp_path):
    whole, broken = tmp_path / "whole" / "a.safetensors", tmp_path / "broken" / "a.safetensors"
    assert prepare(folder, whole) == 0
    statuses, said = kill(folder, broken, 1, 2, 3, 4, 9, 10, 14, 1, 7, 5, 2, 1)
    assert statuses == [-signal.SIGKILL] * 12 + [0]
    assert broken.read_bytes() == whole.read_bytes()
    assert "40 records = 37 written + 3 damaged; the first " in said and "Traceback" not in said
    assert "left out 3 damaged of 40" in said and left_over(broken.parent) == []


@pytest.mark.slow
def test_killed_at_many_flushes_and_at_random_times(folder, tmp_path):
    whole, broken = tmp_path / "whole" / "a.safetensors", tmp_path / "broken" / "a.safetensors"
    assert prepare(folder, whole) == 0
    killed = 0
    for first in range(1, 80, 8):  # an attempt that is not killed has fewer than 80 flushes and renames
        statuses, _ = kill(folder, broken, *range(first, first + 8))
        killed += statuses.count(-signal.SIGKILL)
        assert broken.read_bytes() == whole.read_bytes() and left_over(broken.parent) == []
        broken.unlink()
    random_times = random.Random(0)
    statuses, _ = kill(folder, broken, *(f"{random_times.uniform(0.0, 0.2):.3f}s" for _ in range(60)))
    assert killed > 40 and statuses.count(-signal.SIGKILL) > 10
    assert broken.read_bytes() == whole.read_bytes()


class Stop(BaseException):
    """A kill that Python can see."""


def interrupt(monkeypatch, source, out, after=20, size=8):
    """Packs up to the commit of about `after` images."""
    append = resumable._append

    def stop(lines, entry):
        append(lines, entry)
        if "labels" in entry and Path(lines.name).read_bytes().count(b"\n") > after:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(resumable, "_append", stop)
        prepare(source, out, size=size)
    assert left_over(out.parent) == [f".{out.name}.journal", f".{out.name}.partial"] and not out.exists()


def test_another_size_or_source_starts_anew(folder, tmp_path, monkeypatch, capsys, commit_always):
    out = tmp_path / "out" / "a.safetensors"
    interrupt(monkeypatch, folder, out, size=16)
    assert prepare(folder, out, size=8) == 0
    assert "starting anew" in capsys.readouterr().err
    out.unlink()
    interrupt(monkeypatch, folder, out)
    (folder / "cat" / "1.png").write_bytes(png(np.full((16, 16, 3), 9, np.uint8)))
    assert prepare(folder, out) == 0
    said = capsys.readouterr()
    assert "starting anew" in said.err and "by an earlier run" not in said.out
    assert (read_packed(out).images[0] == 9).all()


def test_what_is_lost_behind_the_journal_is_packed_again(folder, tmp_path, monkeypatch, capsys, commit_always):
    """A file system that lost the images, changed them, or lost the file; nothing of it ends in the packed file."""
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out" / "a.safetensors"
    assert prepare(folder, whole) == 0
    partial = out.with_name(f".{out.name}.partial")
    for harm in (lambda: os.truncate(partial, 1500), lambda: flip(partial, 2000), partial.unlink):
        interrupt(monkeypatch, folder, out)
        harm()
        assert prepare(folder, out) == 0
        assert "by an earlier run" not in capsys.readouterr().out
        assert out.read_bytes() == whole.read_bytes()
        out.unlink()


def flip(path, place):
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 255]))


def test_a_journal_of_nonsense_is_not_believed(folder, tmp_path, monkeypatch, commit_always):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out" / "a.safetensors"
    assert prepare(folder, whole) == 0
    interrupt(monkeypatch, folder, out)
    journal = out.with_name(f".{out.name}.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    first = lines[0]
    for garbage in ([first, b"5\n"], [first, b'{"labels": [0]}\n'], [*lines, b'{"labels": [1], "dam'], [b"\xff\n"]):
        journal.write_bytes(b"".join(garbage))
        assert prepare(folder, out) == 0
        assert out.read_bytes() == whole.read_bytes()
        out.unlink()
        interrupt(monkeypatch, folder, out)


def test_two_processes_at_one_file_are_refused(folder, tmp_path, capsys):
    out = tmp_path / "out" / "a.safetensors"
    out.parent.mkdir()
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with resumable._locked(out.with_name(f".{out.name}.journal")):
            entered.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(60)
    assert prepare(folder, out) == 2
    leave.set()
    holder.join()
    assert f"another process is writing {out}" in capsys.readouterr().err
    assert prepare(folder, out) == 0


def test_too_many_damaged_images_leave_nothing(folder, tmp_path, capsys, commit_always):
    assert prepare(folder, tmp_path / "a.safetensors", "--max-damaged-fraction", 0) == 2
    assert "too many damaged images" in capsys.readouterr().err and left_over(tmp_path) == []


def test_a_full_disk_keeps_what_is_done(folder, tmp_path, monkeypatch, capsys, commit_always):
    from biggan.data.packed import PackedWriter

    out, add = tmp_path / "out" / "a.safetensors", PackedWriter.add

    def full(self, image, label):
        if len(self.labels) == 12:
            raise OSError(28, "No space left on device")
        add(self, image, label)

    with monkeypatch.context() as patch:
        patch.setattr(PackedWriter, "add", full)
        assert prepare(folder, out) == 1
    assert "No space left on device" in capsys.readouterr().err and not out.exists()
    assert prepare(folder, out) == 0
    assert "the first 13 by an earlier run" in capsys.readouterr().out


def test_a_disk_that_does_not_give_back_what_it_got(folder, tmp_path, monkeypatch, capsys):
    finish = resumable.PackedWriter.finish

    def spoil(self):
        finish(self)
        flip(Path(self._file.name), self.end - 1)

    with monkeypatch.context() as patch:
        patch.setattr(resumable.PackedWriter, "finish", spoil)
        assert prepare(folder, tmp_path / "a.safetensors") == 1
    assert "is not read as it was written" in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()
    assert prepare(folder, tmp_path / "a.safetensors") == 0


def test_every_record_is_accounted_for(folder, tmp_path):
    source = open_source(folder)
    source.names.pop()
    source.labels.pop()

    class Longer:
        """One record fewer than it says."""

        title, class_names, listing_hash = source.title, source.class_names, source.listing_hash

        def __len__(self):
            return len(source) + 1

        def __iter__(self):
            return iter(source)

    with pytest.warns(UserWarning), pytest.raises(RunError, match="has 39 records where it had 40"):
        resumable.pack(tmp_path / "a.safetensors", Longer(), 8, progress=False)
    assert not (tmp_path / "a.safetensors").exists()
