"""The commands as a person types them: what they write, and one or two lines for every mistake."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from biggan.__main__ import COMMANDS, dispatch
from biggan.training import train
from runtime.cli import run_command

pytestmark = pytest.mark.filterwarnings("ignore:FID of")


def run(*argv):
    return run_command(dispatch, [str(word) for word in argv])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of two steps, made once for all tests here."""
    out = tmp_path_factory.mktemp("run")
    assert (
        run(
            "train",
            "--preset",
            "demo",
            "--out",
            out,
            "--device",
            "cpu",
            "--total-kimg",
            0.008,
            "--drawn-faces",
            40,
            "--global-batch-size",
            4,
            "--model.generator-channels",
            4,
            "--model.discriminator-channels",
            4,
            "--model.dim-z",
            8,
            "--log.grid",
            2,
            "--log.kimg-per-tick",
            0.004,
        )
        == 0
    )
    return out


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


def assert_fails(capsys, code, text, *argv):
    capsys.readouterr()
    assert run(*argv) == code
    error = capsys.readouterr().err
    message = error[error.index("error: ") :]
    assert text in message and "Traceback" not in error
    assert message.count("\n") <= 2


def test_help_everywhere(capsys):
    assert run() == 0 and "usage: biggan" in capsys.readouterr().out
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            run(command, "--help")
        assert end.value.code == 0
        assert "--checkpoint" in (text := capsys.readouterr().out) or "--preset" in text


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert run("train", "--preset", "celebahq128-smyrf", "--out", tmp_path / "run", "--dry-run") == 0
    assert "parameters" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--preset", "demp"], 2, "presets are demo"),
        (["--sed", "3"], 2, "did you mean --seed?"),
        (["--total-kimg", "long"], 2, "expected float"),
        (["--device", "tpu"], 2, "not one of auto, cpu"),
        (["--preset", "faces64"], 2, "needs images"),
        (["--data", "/nowhere/at/all"], 2, "/nowhere/at/all does not exist"),
        (["--model.resolution", "48"], 2, "48"),
        (["--attention.generator-resolutions", "24"], 2, "24"),
        (["--attention.q-cluster-size", "100"], 2, "cluster"),
        (["--attention", "desne"], 2, "dense"),
        (["--attention", "dense", "--attention.num-hashes", "4"], 2, "num_hashes"),
        (["--global-batch-size", "0"], 2, "--global-batch-size"),
        (["--accumulation-steps", "3"], 2, "multiple of --accumulation-steps"),
    ],
)
def test_wrong_flags_of_train(capsys, tmp_path, flags, code, text):
    assert_fails(capsys, code, text, "train", "--out", tmp_path / "run", "--drawn-faces", 8, *flags)


def test_wrong_data(capsys, tmp_path, images):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no images here")
    assert_fails(capsys, 2, "no image", "train", "--data", empty, "--out", tmp_path / "run")
    broken = tmp_path / "broken.zip"
    with zipfile.ZipFile(broken, "w") as archive:
        archive.write(images / "0.jpg", "0.jpg")
    broken.write_bytes(broken.read_bytes()[:-30])
    assert_fails(capsys, 2, "broken.zip", "train", "--data", broken, "--out", tmp_path / "run")


def test_a_truncated_image_among_good_ones_is_named_and_skipped(capsys, tmp_path, images, monkeypatch):
    (images / "7.jpg").write_bytes((images / "7.jpg").read_bytes()[:300])
    assert (
        run(
            "train",
            "--preset",
            "faces64",
            "--data",
            images,
            "--out",
            tmp_path / "run",
            "--device",
            "cpu",
            "--model.resolution",
            32,
            "--attention.generator-resolutions",
            16,
            "--attention.discriminator-resolutions",
            16,
            "--total-kimg",
            0.004,
            "--global-batch-size",
            4,
            "--model.generator-channels",
            4,
            "--log.grid",
            2,
            "--model.discriminator-channels",
            4,
            "--log.metric-every-ticks",
            0,
        )
        == 0
    )
    captured = capsys.readouterr()
    assert "7.jpg" in captured.err and "19 images" in captured.out


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert_fails(capsys, 2, "--out", "train", "--out", tmp_path / "file" / "run", "--drawn-faces", 8)


def test_a_full_disk_keeps_the_previous_checkpoint(capsys, tiny_config, monkeypatch):
    import runtime.checkpoint

    fsync, count = runtime.checkpoint.os.fsync, []

    def full_at_the_second_checkpoint(handle):
        count.append(Path(f"/proc/self/fd/{handle}").resolve().name)
        if sum(name.startswith(".step-") for name in count) == 2:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(runtime.checkpoint.os, "fsync", full_at_the_second_checkpoint)
    assert run_command(lambda argv: train(tiny_config) and None, []) == 1
    assert "No space left" in capsys.readouterr().err
    assert [p.name for p in (Path(tiny_config.out) / "checkpoints").iterdir()] == ["step-00000002.pt"]


def test_sample_writes_grids_arrays_and_folders(finished_run, tmp_path):
    sample = ("sample", "--checkpoint", finished_run, "--device", "cpu")
    assert run(*sample, "--num", 6, "--out", tmp_path / "grid.png", "--columns", 3) == 0
    assert Image.open(tmp_path / "grid.png").size == (3 * 34 + 2, 2 * 34 + 2)
    assert run(*sample, "--num", 5, "--out", tmp_path / "five.npz", "--batch-size", 2) == 0
    assert run(*sample, "--num", 3, "--out", tmp_path / "folder") == 0
    five, names = np.load(tmp_path / "five.npz"), sorted(p.name for p in (tmp_path / "folder").iterdir())
    assert five["x"].shape == (5, 32, 32, 3) and five["x"].dtype == np.uint8 and five["y"].tolist() == [0] * 5
    assert names == ["000000.png", "000001.png", "000002.png"]
    # Image i of a seed is the same however many are drawn, and in whatever batches (up to rounding of the last bit).
    third = np.asarray(Image.open(tmp_path / "folder" / "000002.png")).astype(int)
    assert np.abs(third - five["x"][2]).max() <= 1
    assert run(*sample, "--num", 3, "--out", tmp_path / "other.npz", "--seed", 1) == 0
    assert not np.array_equal(np.load(tmp_path / "other.npz")["x"], five["x"][:3])


def test_sample_options(finished_run, tmp_path):
    sample = ("sample", "--checkpoint", finished_run, "--device", "cpu", "--num", 4)
    arrays = {}
    for name, flags in {
        "kept": [],
        "raw": ["--weights", "raw"],
        "dense": ["--attention", "dense"],
        "truncated": ["--truncation", 0.3],
        "hashes": ["--attention.num-hashes", 1],
        "standing": ["--standing-statistics", 2, "--batch-size", 4],
    }.items():
        assert run(*sample, "--out", tmp_path / f"{name}.npz", *flags) == 0
        arrays[name] = np.load(tmp_path / f"{name}.npz")["x"]
    assert not np.array_equal(arrays["kept"], arrays["raw"])
    assert not np.array_equal(arrays["kept"], arrays["truncated"])
    assert not np.array_equal(arrays["kept"], arrays["standing"])
    assert run(*sample, "--out", tmp_path / "sheet.png", "--interpolate", "--columns", 4) == 0
    assert Image.open(tmp_path / "sheet.png").size == (4 * 34 + 2, 34 + 2)


def test_export_is_the_averaged_generator(finished_run, tmp_path):
    assert run("export", "--checkpoint", finished_run, "--out", tmp_path / "g.safetensors") == 0
    for source, name in ((finished_run, "a.npz"), (tmp_path / "g.safetensors", "b.npz")):
        assert run("sample", "--checkpoint", source, "--num", 2, "--out", tmp_path / name, "--device", "cpu") == 0
    assert np.array_equal(np.load(tmp_path / "a.npz")["x"], np.load(tmp_path / "b.npz")["x"])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--num", "0"], "--num"),
        (["--classes", "3"], "classes 0 to 0"),
        (["--interpolate", "y"], "only z"),
        (["--truncation", "-1"], "--truncation"),
        (["--out", "samples.bmp"], ".png"),
        (["--attention", "smirf"], "smyrf"),
        (["--attention.q-cluster-size", "100"], "cluster"),
        (["--attention.colour", "red"], "colour"),
        (["--atention", "dense"], "did you mean --attention?"),
        (["--weights", "best"], "--weights"),
    ],
)
def test_wrong_flags_of_sample(capsys, finished_run, flags, text):
    assert_fails(capsys, 2, text, "sample", "--checkpoint", finished_run, "--device", "cpu", *flags)


def test_wrong_checkpoints(capsys, finished_run, tmp_path):
    good = sorted((finished_run / "checkpoints").iterdir())[-1]
    for name, content in {"cut.pt": good.read_bytes()[:5000], "text.pt": b"hello", "cut.safetensors": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        assert_fails(capsys, 2, name, "sample", "--checkpoint", tmp_path / name)
    torch.save({"shared.weight": torch.ones(2)}, tmp_path / "G_ema.pth")
    assert_fails(capsys, 2, "convert_biggan", "sample", "--checkpoint", tmp_path / "G_ema.pth")
    torch.save({"format": "biggan", "generator": Malicious(tmp_path / "marker")}, tmp_path / "code.pt")
    assert_fails(capsys, 2, "could run code", "sample", "--checkpoint", tmp_path / "code.pt")
    assert not (tmp_path / "marker").exists()
    assert_fails(capsys, 2, "no checkpoint", "sample", "--checkpoint", tmp_path / "missing.pt")
    assert_fails(capsys, 2, "no checkpoint", "sample", "--checkpoint", tmp_path)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_initial_weights_of_another_architecture(capsys, finished_run, tmp_path):
    assert_fails(
        capsys,
        2,
        "another architecture",
        "train",
        "--out",
        tmp_path / "run",
        "--drawn-faces",
        8,
        "--device",
        "cpu",
        "--initial-weights",
        finished_run,
    )


def test_a_run_directory_of_another_architecture(capsys, finished_run):
    assert_fails(
        capsys,
        2,
        "generator_channels was 4",
        "train",
        "--out",
        finished_run,
        "--drawn-faces",
        40,
        "--device",
        "cpu",
        "--global-batch-size",
        4,
        "--model.generator-channels",
        8,
    )


def test_evaluate_a_checkpoint_and_a_folder(finished_run, tmp_path, capsys, images):
    assert (
        run(
            "evaluate",
            "--checkpoint",
            finished_run,
            "--metrics",
            "swd",
            "--num",
            32,
            "--device",
            "cpu",
            "--json",
            tmp_path / "values.json",
            "--cache",
            tmp_path / "cache",
        )
        == 0
    )
    assert "swd32" in capsys.readouterr().out and "swd32" in (tmp_path / "values.json").read_text()
    assert (
        run(
            "evaluate",
            "--samples",
            images,
            "--data",
            images,
            "--metrics",
            "swd",
            "--device",
            "cpu",
            "--resolution",
            32,
            "--cache",
            tmp_path / "cache",
        )
        == 0
    )
    assert "swd20" in capsys.readouterr().out
    assert_fails(capsys, 2, "fid, kid, is", "evaluate", "--checkpoint", finished_run, "--metrics", "fidd", "--num", 8)
    assert_fails(capsys, 2, "either --checkpoint", "evaluate", "--metrics", "swd")
    assert_fails(capsys, 2, "needs --data", "evaluate", "--samples", images)
    assert_fails(
        capsys,
        2,
        "nothing.pth",
        "evaluate",
        "--checkpoint",
        finished_run,
        "--metrics",
        "fid",
        "--num",
        8,
        "--inception-weights",
        tmp_path / "nothing.pth",
    )
