"""The commands as a person types them: what they write, and one or two lines for every mistake."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_hrrformer import pack_text

from hrrformer.__main__ import COMMANDS, dispatch
from runtime import checkpoint
from runtime.cli import run_command

ROOT = Path(__file__).parents[2]
TINY = (
    *("--device", "cpu", "--epochs", 1, "--batch-size", 8, "--model.dim", 16, "--model.num-heads", 2),
    *("--model.mlp-dim", 16, "--optimizer.lr", 0.01, "--log.steps-per-tick", 5, "--log.validate-every-ticks", 2),
)
TEXT = ("--task", "text", *TINY, "--model.max-length", 24, "--length-buckets", 16)
IMAGE = ("--task", "image", *TINY, "--model.max-length", 64)  # with more outputs than classes


def run(*argv):
    return run_command(dispatch, [str(word) for word in argv])


def assert_fails(capsys, code, text, *argv):
    capsys.readouterr()
    assert run(*argv) == code
    error = capsys.readouterr().err
    message = error[error.index("error: ") :]
    assert text in message and "Traceback" not in error
    assert message.count("\n") <= 2


@pytest.fixture(scope="module")
def finished_text(tmp_path_factory, tiny_text):
    out = tmp_path_factory.mktemp("text")
    assert run("train", *TEXT, "--data", tiny_text, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def finished_image(tmp_path_factory, tiny_image):
    out = tmp_path_factory.mktemp("image")
    assert run("train", *IMAGE, "--data", tiny_image, "--out", out) == 0
    return out


def test_help_everywhere(capsys):
    assert run() == 0 and "usage: hrrformer" in capsys.readouterr().out
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            run(command, "--help")
        assert end.value.code == 0
        assert "--checkpoint" in (text := capsys.readouterr().out) or "--task" in text
    done = subprocess.run([sys.executable, "-m", "hrrformer"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: hrrformer" in done.stdout


def test_help_of_a_task_shows_its_defaults(capsys):
    with pytest.raises(SystemExit):
        run("train", "--task", "malware", "--help")
    assert "default: two-sided" in capsys.readouterr().out


def test_dry_run_trains_nothing(tmp_path, capsys, tiny_text):
    assert run("train", *TEXT, "--data", tiny_text, "--out", tmp_path / "run", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "parameters" in said and "25 steps to train" in said and not (tmp_path / "run").exists()
    assert run("train", "--task", "retrieval", "--preset", "full", "--dry-run") == 0  # without its files
    assert "not given" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--task", "txt"], "tasks are listops, text"),
        (["--preset", "fulll"], "presets are single, full"),
        (["--sed", "3"], "did you mean --seed?"),
        (["--epochs", "long"], "expected float"),
        (["--device", "tpu"], "not one of auto, cpu"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--data", ""], "--data PATH"),
        (["--attention", "hhr"], "hrr"),
        (["--attention.colour", "red"], "colour"),
        (["--attention", "dense", "--attention.num-hashes", "4"], "num_hashes"),
        (["--attention", "fnet"], "--model.use-mask"),
        (["--model.num-heads", "5"], "multiple of num_heads"),
        (["--model.norm", "above"], "post, pre, mlp"),
        (["--model.vocab-size", "100"], "257 token ids"),
        (["--model.num-outputs", "1"], "2 classes"),
        (["--model.dual-input"], "1 inputs"),
        (["--model.max-length", "64"], "24"),
        (["--length-buckets", "100"], "bucket lengths"),
        (["--model.pooling", "mean"], "amount of padding"),
        (["--attention.mask-superposition", "false"], "amount of padding"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "201"], "200 examples"),
        (["--accumulation-steps", "3"], "multiple of --accumulation-steps"),
        (["--epochs", "0"], "--epochs"),
        (["--pretrain-mask-rate", "1.5"], "--pretrain-mask-rate"),
        (["--log.steps-per-tick", "0"], "--log.steps-per-tick"),
        (["--optimizer.lr", "-1"], "--optimizer.lr"),
        (["--optimizer.beta1", "1.5"], "beta"),
    ],
)
def test_wrong_flags_of_train(capsys, tmp_path, tiny_text, flags, text):
    assert_fails(capsys, 2, text, "train", *TEXT, "--data", tiny_text, "--out", tmp_path / "run", *flags)


def test_a_task_must_be_given(capsys):
    assert_fails(capsys, 2, "one of listops, text, retrieval", "train")


def test_wrong_data(capsys, tmp_path, tiny_image):
    assert_fails(capsys, 2, "holds the task image", "train", *TEXT, "--data", tiny_image, "--out", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert_fails(capsys, 2, "aclImdb", "train", *TEXT, "--data", tmp_path / "empty", "--out", tmp_path / "run")
    one_class = tmp_path / "aclImdb"
    for split in ("train", "test"):
        for name in ("neg", "pos"):
            (one_class / split / name).mkdir(parents=True)
        (one_class / split / "neg" / "1_1.txt").write_text("a bad film")
    assert_fails(capsys, 2, "pos is empty", "train", *TEXT, "--data", one_class, "--out", tmp_path / "run")


def test_a_folder_that_cannot_be_written(capsys, tmp_path, tiny_text):
    (tmp_path / "file").write_text("")
    assert_fails(capsys, 2, "--out", "train", *TEXT, "--data", tiny_text, "--out", tmp_path / "file" / "run")


def test_train_says_where_things_are_and_resumes(finished_text, tiny_text, capsys):
    assert run("train", *TEXT, "--data", tiny_text, "--out", finished_text) == 0
    said = capsys.readouterr().out
    assert "majority baseline: 50.0%" in said and "resuming from" in said
    assert f"checkpoint: {finished_text}/checkpoints/best.pt" in said and "test:       accuracy" in said
    assert f"evaluate --checkpoint {finished_text}" in said


def test_a_run_directory_of_another_run(capsys, finished_text, tiny_image, tiny_text):
    again = ("--data", tiny_text, "--out", finished_text)
    assert_fails(capsys, 2, "model.dim was 16, now 32", "train", *TEXT, *again, "--model.dim", 32)
    assert_fails(capsys, 2, "of the task text", "train", *IMAGE, "--data", tiny_image, "--out", finished_text)


def test_weights_to_start_from(capsys, finished_text, finished_image, tiny_text, tmp_path):
    train = ("train", *TEXT, "--data", tiny_text, "--max-steps", 5)
    assert run(*train, "--out", tmp_path / "more", "--initial-weights", finished_text) == 0
    new = (*train, "--out", tmp_path / "run", "--initial-weights")
    assert_fails(capsys, 2, "of the task image, not of text", *new, finished_image)
    assert_fails(capsys, 2, "another architecture", *new, finished_text, "--model.dim", 32)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_evaluate(finished_text, finished_image, tmp_path, capsys):
    result = json.loads((finished_text / "result.json").read_text())
    assert run("evaluate", "--checkpoint", finished_text, "--device", "cpu", "--out", tmp_path / "found.json") == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["accuracy"] == result["test_accuracy"] and found["step"] == result["best_step"]
    assert f"{found['accuracy']:.2%}" in said and "peak memory" in said and "neg" in said
    assert sum(map(sum, found["confusion"])) == found["examples"] == 40
    rows = [row[i] / sum(row) for i, row in enumerate(found["confusion"])]
    assert list(found["class_accuracies"].values()) == pytest.approx(rows)
    assert run("evaluate", "--checkpoint", finished_image, "--device", "cpu", "--out", tmp_path / "image.json") == 0
    assert "output 9" in capsys.readouterr().out
    found = json.loads((tmp_path / "image.json").read_text())
    assert len(found["confusion"]) == 10 and found["class_accuracies"]["output 9"] is None
    one = finished_text / "checkpoints" / "step-00000025.pt"
    assert run("evaluate", "--checkpoint", one, "--split", "validation", "--device", "cpu", "--batch-size", 7) == 0
    assert "validation split" in capsys.readouterr().out


def test_evaluate_on_other_data(finished_text, tiny_image, tmp_path, capsys):
    other = pack_text(tmp_path)
    assert run("evaluate", "--checkpoint", finished_text, "--data", other, "--device", "cpu") == 0
    evaluate = ("evaluate", "--checkpoint", finished_text, "--device", "cpu")
    assert_fails(capsys, 2, "holds the task image", *evaluate, "--data", tiny_image)
    assert_fails(capsys, 2, "does not exist", *evaluate, "--data", tmp_path / "nothing")
    assert_fails(capsys, 2, "--batch-size", *evaluate, "--batch-size", 0)
    assert_fails(capsys, 2, "choose from", *evaluate, "--split", "tests")


def test_heatmap(finished_image, finished_text, tiny_image, tmp_path, capsys):
    heatmap = ("heatmap", "--checkpoint", finished_image, "--out", tmp_path / "new" / "weights.png")
    assert run(*heatmap, "--example", 3, 5) == 0
    width, height = Image.open(tmp_path / "new" / "weights.png").size
    assert run(*heatmap, "--example", 3) == 0
    assert Image.open(tmp_path / "new" / "weights.png").size[1] < height and width > 3 * 190  # input and two heads
    assert_fails(capsys, 2, "examples 0 to 39", *heatmap, "--example", 40)
    assert_fails(capsys, 2, ".png", *heatmap[:-1], tmp_path / "weights.jpg")
    assert_fails(capsys, 2, "on the task text", "heatmap", "--checkpoint", finished_text, *heatmap[3:])
    deep = ("--model.num-layers", 2, "--max-steps", 1, "--data", tiny_image, "--out", tmp_path / "deep")
    assert run("train", *IMAGE, *deep) == 0
    assert_fails(capsys, 2, "it has 2 layers", "heatmap", "--checkpoint", tmp_path / "deep", *heatmap[3:])


def test_wrong_checkpoints(capsys, finished_text, tmp_path):
    good = finished_text / "checkpoints" / "best.pt"
    for name, content in {"cut.pt": good.read_bytes()[:5000], "text.pt": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        assert_fails(capsys, 2, name, "evaluate", "--checkpoint", tmp_path / name)
    checkpoint.save(tmp_path / "gan.pt", {"config": {}, "generator": {"a": torch.ones(1)}}, "biggan")
    assert_fails(capsys, 2, "a checkpoint of 'biggan'", "evaluate", "--checkpoint", tmp_path / "gan.pt")
    assert_fails(capsys, 2, "no checkpoint", "evaluate", "--checkpoint", tmp_path / "missing.pt")
    assert_fails(capsys, 2, "no checkpoint", "evaluate", "--checkpoint", tmp_path)


def test_a_pretrained_encoder_is_no_classifier(capsys, tiny_text, tmp_path):
    flags = ("--pretrain-epochs", 0.2, "--max-steps", 1, "--data", tiny_text, "--out", tmp_path)
    assert run("train", *TEXT, *flags) == 0
    pretrained = tmp_path / "checkpoints" / "pretrained.pt"
    assert_fails(capsys, 2, "no classifier yet", "evaluate", "--checkpoint", pretrained)


def test_sigterm_saves_and_the_same_command_finishes(finished_text, tiny_text, tmp_path):
    """In a process of its own, killed as a scheduler does; what comes out is the uninterrupted run."""
    words = [str(word) for word in ("train", *TEXT, "--data", tiny_text, "--out", tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "hrrformer", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr.readline().startswith("train  epoch")  # the first tick
    process.send_signal(signal.SIGTERM)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "to resume: python -m hrrformer train --task text" in said
    assert run(*words) == 0
    newest = "checkpoints/step-00000025.pt"
    whole = checkpoint.load(finished_text / newest, "hrrformer")
    found = checkpoint.load(tmp_path / "run" / newest, "hrrformer")
    assert all(torch.equal(value, found["weights"][name]) for name, value in whole["weights"].items())
