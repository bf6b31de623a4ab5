"""Files that would run a program where they are read carelessly: every command refuses them in one line, or ignores it.

The payload makes a file, the marker, when it is unpickled; `test_the_payload_works` shows that it does.
"""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_hrrformer import pack_image

import biggan.__main__
import hrrformer.__main__
import tools.convert_biggan
from runtime.cli import run_command

TRAIN_GAN = ("train", "--preset", "demo", "--device", "cpu", "--drawn-faces", "24", "--total-kimg", "0.008")
TRAIN_CLASSIFIER = ("train", "--task", "image", "--device", "cpu", "--max-steps", "1")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Program(torch.nn.Module):
    def forward(self, x):
        return x + 1


def zip_format(path, tree):
    torch.save(tree, path)


def old_format(path, tree):
    torch.save(tree, path, _use_new_zipfile_serialization=False)


def bare_pickle(path, tree):
    path.write_bytes(pickle.dumps(tree))


def tar_format(path, tree):
    """As torch wrote before 2016: to read one, torch unpacks members to disk."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            add_member(archive, name, pickle.dumps(tree))


def torchscript(path, tree):
    torch.jit.script(Program()).save(str(path))


def object_array(path, tree):
    with open(path, "wb") as file:
        np.savez(file, x=np.array([tree], dtype=object), mean=np.array([tree], dtype=object))


def bare_array(path, tree):
    with open(path, "wb") as file:
        np.save(file, np.array([tree], dtype=object))


def add_member(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


WEIGHTS = [zip_format, old_format, bare_pickle, tar_format, torchscript]
ARRAYS = [object_array, bare_array, bare_pickle]


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


def tree_with(marker, kind="biggan"):
    return {"format": kind, "checksum": "", "config": {}, "weights": Payload(marker)}


def refused(capsys, marker, main, *argv):
    """Runs a command that must end with status 2, an error of at most two lines and no marker; returns the error."""
    code = run_command(main, [str(word) for word in argv])
    said = capsys.readouterr().err
    errors = said[said.index("error: ") :].strip().splitlines() if "error: " in said else []
    assert code == 2 and 1 <= len(errors) <= 2 and "Traceback" not in said, said
    assert not marker.exists()
    return "\n".join(errors)


@pytest.mark.parametrize("read", [pickle.load, lambda file: torch.load(file, weights_only=False)])
def test_the_payload_works(tmp_path, marker, read):
    write = bare_pickle if read is pickle.load else zip_format
    write(tmp_path / "file", Payload(marker))
    with open(tmp_path / "file", "rb") as file:
        read(file)
    assert marker.exists()


@pytest.mark.parametrize("write", WEIGHTS)
def test_checkpoints_of_biggan(tmp_path, marker, capsys, write):
    file, out = tmp_path / "c.pt", tmp_path / "out"
    write(file, tree_with(marker))
    main = biggan.__main__.dispatch
    for command in (
        ("sample", "--checkpoint", file, "--out", tmp_path / "s.png"),
        ("evaluate", "--checkpoint", file, "--metrics", "swd", "--num", 4, "--device", "cpu"),
        ("export", "--checkpoint", file, "--out", tmp_path / "e.safetensors"),
        (*TRAIN_GAN, "--initial-weights", file, "--out", out),
    ):
        assert "c.pt" in refused(capsys, marker, main, *command)
    (out / "checkpoints").mkdir(exist_ok=True, parents=True)
    file.rename(out / "checkpoints" / "step-00000002.pt")
    assert "can be read" in refused(capsys, marker, main, *TRAIN_GAN, "--out", out)
    assert "can be read" in refused(capsys, marker, main, "sample", "--checkpoint", out, "--out", tmp_path / "s.png")


@pytest.mark.parametrize("write", WEIGHTS)
def test_checkpoints_of_hrrformer(tmp_path, marker, capsys, write):
    file, out, data = tmp_path / "c.pt", tmp_path / "out", pack_image(tmp_path)
    write(file, tree_with(marker, "hrrformer"))
    train = (*TRAIN_CLASSIFIER, "--data", data, "--model.max-length", 64)
    main = hrrformer.__main__.dispatch
    for command in (
        ("evaluate", "--checkpoint", file, "--data", data),
        ("heatmap", "--checkpoint", file, "--out", tmp_path / "h.png"),
        (*train, "--initial-weights", file, "--out", out),
    ):
        assert "c.pt" in refused(capsys, marker, main, *command)
    (out / "checkpoints").mkdir(exist_ok=True, parents=True)
    (out / "checkpoints" / "best.pt").write_bytes(file.read_bytes())
    file.rename(out / "checkpoints" / "step-00000002.pt")
    assert "best.pt" in refused(capsys, marker, main, "evaluate", "--checkpoint", out, "--data", data)
    assert "can be read" in refused(capsys, marker, main, *train, "--out", out)


@pytest.mark.parametrize("write", WEIGHTS)
def test_files_of_original_biggan(tmp_path, marker, capsys, write):
    write(tmp_path / "G.pth", {"linear.weight": Payload(marker)})
    assert "G.pth" in refused(capsys, marker, tools.convert_biggan.main, tmp_path, tmp_path / "out.pt")


@pytest.mark.parametrize("write", WEIGHTS)
def test_weights_of_feature_networks(tmp_path, marker, capsys, write, monkeypatch):
    file, samples = tmp_path / "weights.pth", tmp_path / "samples"
    write(file, {"fc.bias": Payload(marker)})
    samples.mkdir()
    Image.new("RGB", (8, 8)).save(samples / "0.png")
    start = ("evaluate", "--samples", samples, "--data", samples, "--device", "cpu", "--cache", tmp_path / "cache")
    for network in ("fid-inception", "torchvision:resnet18@32"):
        command = (*start, "--metrics", "fid", "--network", network, "--network-weights", file)
        assert "weights.pth" in refused(capsys, marker, biggan.__main__.dispatch, *command)
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(file))
    assert "weights.pth" in refused(capsys, marker, biggan.__main__.dispatch, *start, "--metrics", "fid")


@pytest.mark.parametrize("write", [zip_format, old_format, bare_pickle])
def test_weights_of_timm(tmp_path, marker, write):
    pytest.importorskip("timm")
    from biggan.metrics.networks import load_network
    from runtime.errors import UserError

    write(tmp_path / "weights.pth", {"fc.bias": Payload(marker)})
    with pytest.raises(UserError, match="weights.pth"):
        load_network("timm:resnet10t@32", tmp_path / "weights.pth")
    assert not marker.exists()


def test_torchvisions_own_downloads(tmp_path, marker, monkeypatch, capsys):
    """A file of torch.hub's cache, which torchvision itself loads as any pickle."""
    from biggan.metrics.networks import load_network

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    zip_format(tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth", {"fc.bias": Payload(marker)})
    said = refused(capsys, marker, lambda argv: load_network("torchvision:resnet18@32", None) and 0)
    assert "resnet18 cannot be had here" in said


@pytest.mark.parametrize("write", ARRAYS)
def test_arrays(tmp_path, marker, capsys, write):
    samples, statistics = tmp_path / "samples.npz", tmp_path / "images"
    write(samples, Payload(marker))
    statistics.mkdir()
    Image.new("RGB", (32, 32)).save(statistics / "0.png")
    start = ("evaluate", "--metrics", "swd", "--device", "cpu", "--cache", tmp_path / "cache")
    said = refused(capsys, marker, biggan.__main__.dispatch, *start, "--samples", samples, "--data", statistics)
    assert "samples.npz" in said
    from biggan.metrics.statistics import FeatureProtocol, load_statistics

    protocol = FeatureProtocol("network", "hash", "rule", 32, "data", "all")
    said = refused(capsys, marker, lambda argv: load_statistics(samples, protocol) and 0)
    assert "samples.npz" in said


def test_cifar_batches(tmp_path, marker, capsys):
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        bare_pickle(tmp_path / name, {"data": np.zeros((1, 3072), np.uint8), "labels": [Payload(marker)]})
    command = (*TRAIN_CLASSIFIER, "--data", tmp_path, "--out", tmp_path / "out")
    assert "data_batch_1" in refused(capsys, marker, hrrformer.__main__.dispatch, *command)
