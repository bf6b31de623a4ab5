"""Archives and pictures that claim too much, or names outside their folder: no memory is taken, nothing written."""

import bz2
import gzip
import io
import json
import lzma
import os
import resource
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from image_variants import claiming, image_files
from launch import ROOT, environment

from biggan.data import open_images
from biggan.data.arrays import read_npz
from biggan.data.decode import DamagedImage, open_image, square_rgb
from hrrformer.data import open_task
from hrrformer.tasks import get_task
from hrrformer.tasks.files import MAX_LINE_BYTES, lines
from hrrformer.tasks.malware import first_bytes
from hrrformer.tasks.pixels import decode
from runtime import archives, checkpoint
from runtime.archives import open_tar
from runtime.errors import UserError

OUTSIDE = ("../outside.txt", "a/../../outside.txt", "/tmp/outside-of-the-archive.txt", "..\\outside.txt")


def everything_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def special_members():
    """Links to a secret, and a device and a pipe, under the names of texts."""
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo(f"aclImdb/train/pos/{kind.decode()}.txt")
        info.type, info.linkname = kind, "../../../../secret.txt"
        yield info


@pytest.mark.parametrize("opener", [open, gzip.open, bz2.open, lzma.open])
def test_a_tar_is_read_in_place(tmp_path, opener):
    place = tmp_path / "in" / "set"
    place.mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    names = [f"aclImdb/{split}/{kind}/0_1.txt" for split in ("train", "test") for kind in ("pos", "neg")]
    with opener(place / "a.tar", "wb") as raw, tarfile.open(fileobj=raw, mode="w") as archive:
        for name in (*OUTSIDE, "../train/pos/2.txt", "/etc/train/pos/3.txt", *names):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"text"))
        for info in special_members():
            archive.addfile(info)
    before = everything_below(tmp_path)
    source = get_task("text").open(place / "a.tar", 64)
    texts = [inputs[0] for split in source.sizes for inputs, _ in source.read(split, 1)]
    assert texts == [b"text"] * 6  # the names only say of which class a text is
    assert everything_below(tmp_path) == before and not os.path.exists(OUTSIDE[2])


def test_a_zip_is_read_in_place(tmp_path):
    place, data = tmp_path / "in" / "set", image_files()["rgb.png"]
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "a.zip", "w") as archive:
        for name in (*(f"{name}.png" for name in OUTSIDE), "inside.png"):
            archive.writestr(name, data)
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16  # a symbolic link, for those who unpack
        archive.writestr(link, "/etc/passwd")
    before = everything_below(tmp_path)
    with pytest.warns(UserWarning, match="left out 1 damaged .*link.png .not an image"):
        dataset = open_images(place / "a.zip", 16, progress=False, labels=False)
    assert len(dataset) == 2  # names with .. in them are passed over like all that begin with a point
    assert everything_below(tmp_path) == before and not os.path.exists(OUTSIDE[2] + ".png")


def test_a_table_of_pathfinder_names_nothing_outside(tmp_path):
    (tmp_path / "metadata").mkdir()
    for folder, name in (("../..", "etc/passwd"), ("/etc", "passwd"), ("imgs", "../../x"), ("imgs", "a\0b")):
        (tmp_path / "metadata" / "0.npy").write_text(f"{folder} {name} 0 1\n")
        with pytest.raises(UserError, match="line 1: .* leads out of the folder"):
            get_task("pathfinder").open(tmp_path, 1024)


def test_pipes_are_not_waited_for(tmp_path):
    for split in ("train", "test"):
        for kind in ("benign", "malware", "pos", "neg"):
            (tmp_path / split / kind).mkdir(parents=True)
            (tmp_path / split / kind / "a.txt").write_bytes(b"text")
            os.mkfifo(tmp_path / split / kind / "pipe.txt")
    for task in ("text", "malware"):
        source = get_task(task).open(tmp_path, 64)
        assert [inputs for inputs, _ in source.read("train", 1)] == [(b"text",)] * 2


# Bombs


def test_a_tar_that_unpacks_to_too_much(tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.tar.gz"
    with gzip.open(bomb, "wb", 1) as raw, tarfile.open(fileobj=raw, mode="w") as archive:
        for name in ("a", "aclImdb/train/pos/0.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3 << 20
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    assert bomb.stat().st_size < 1 << 16
    monkeypatch.setattr(archives, "MAX_TAR_BYTES", 1 << 22)
    with pytest.raises(UserError, match="bomb.tar.gz is refused: it unpacks to more than"):
        next(get_task("text").open(bomb, 64).read("train", 1))


def test_a_name_of_a_member_is_not_a_bomb_either(tmp_path):
    """A header of the extended kind, of which tarfile reads as much as it claims."""
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    bomb = tmp_path / "bomb.tar"
    bomb.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 16))
    with pytest.raises(UserError, match="has names of more than 16 MiB"), open_tar(bomb) as archive:
        archive.next()


def test_programs_are_unpacked_as_far_as_they_are_read(tmp_path):
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(bytes(1 << 24), mtime=0))
    assert first_bytes(100, file) == bytes(100)


def test_members_of_a_zip_that_are_too_large_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/dog/0.png"):
            archive.writestr(name, bytes(1 << 16))
    data = (tmp_path / "a.zip").read_bytes()
    size = (1 << 16).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data.replace(size, (3 << 30).to_bytes(4, "little")))  # also what the headers say
    with pytest.raises(UserError, match="3,221,225,472 bytes are too many for one image"):
        open_images(tmp_path / "a.zip" / "train", 16, progress=False)
    with pytest.raises(UserError, match="3,221,225,472 bytes are too many for one image"):
        next(get_task("image").open(tmp_path / "a.zip", 64).read("train", 1))


def test_arrays_that_unpack_to_too_much(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((64, 64, 64, 3), np.uint8))
    assert len(read_npz(tmp_path / "a.npz")) == 64
    monkeypatch.setattr(archives, "_FREE_BYTES", 1 << 16)
    with pytest.raises(UserError, match="a.npz is refused: it unpacks to 0.0 GiB"):
        read_npz(tmp_path / "a.npz")


def test_an_array_that_claims_more_than_there_is(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 8, 8, 3), np.uint8))
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(data.replace(b"(1, 8, 8, 3)", b"(9**9,8,8,3)"))
    with pytest.raises(UserError, match="a.npz is damaged"):
        read_npz(tmp_path / "a.npz")


def test_compressed_checkpoints_are_not_unpacked(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"weights": torch.zeros(1 << 18)}, "test")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as whole,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in whole.namelist():
            out.writestr(name, whole.read(name))
    assert torch.load(tmp_path / "b.pt", weights_only=True)["weights"].shape == (1 << 18,)  # torch itself unpacks it
    with pytest.raises(UserError, match="b.pt is damaged"):
        checkpoint.load(tmp_path / "b.pt", "test")


def test_a_tensor_that_repeats_one_number(tmp_path):
    torch.save({"weights": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt is damaged"):
        checkpoint.load(tmp_path / "a.pt", "test")


def test_a_line_without_an_end(tmp_path):
    with open(tmp_path / "a.tsv", "wb") as file:
        file.write(b"short\n")
        file.truncate(MAX_LINE_BYTES + 10)
    found = lines(tmp_path / "a.tsv")
    assert next(found) == (1, b"short")
    with pytest.raises(UserError, match="a.tsv, line 2: longer than 64 MiB"):
        next(found)


def test_a_packed_file_of_other_tokens(tmp_path):
    from tiny_hrrformer import pack_image

    whole = pack_image(tmp_path)
    data = whole.read_bytes()
    for old, new in ((b'"first_id": "0"', b'"first_id": "9"'), (b'"dtype": "U8"', b'"dtype": "I8"')):
        assert old in data
        whole.write_bytes(data.replace(old, new))
        with pytest.raises(UserError, match="is damaged"):
            open_task("image", str(whole), 64, progress=False)


# Pictures

MEASURE = """
import json, resource, sys
sys.path.insert(0, "tests")
from test_hostile_archives import peak_growth
print(json.dumps(peak_growth()))
"""


def peak_growth():
    """MiB by which a process that has read a sound file of each kind grows while it refuses all of `claiming`."""
    for data in image_files().values():
        square_rgb(open_image(data), 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (*claiming(16000).values(), *claiming(60000).values()):
        for reader, refusal in ((open_image, DamagedImage), (decode, ValueError)):
            with pytest.raises(refusal):
                reader(data)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize("name", claiming(60000))
@pytest.mark.parametrize("side", [9000, 60000])
def test_absurd_dimensions_are_refused_before_decoding(name, side):
    with pytest.raises(DamagedImage, match="too many for one image|exceeds limit|create decoder"):
        open_image(claiming(side)[name])


@pytest.mark.parametrize("name", claiming(64))
def test_the_files_are_else_sound_enough_to_be_opened(name):
    assert open_image(claiming(64)[name]).width == 64


def test_absurd_dimensions_take_no_memory():
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 32
