"""The comparison of mechanisms on a tiny task: what it records, that it goes on where it stopped, and its tables."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_hrrformer import pack_image

from attention import available_attention
from hrrformer.data import open_task
from runtime.cli import run_command
from runtime.errors import RunError, UserError
from tools import compare_mechanisms
from tools.mechanism_tables import cost_table, score_table
from tools.published_scores import PUBLISHED, published
from tools.reduced_tasks import write_reduced

SIZES = {"train": 40, "validation": 8, "test": 16}
SMALL = [word for split, size in SIZES.items() for word in (f"--{split}-examples", str(size))]


def run(*argv):
    return run_command(compare_mechanisms.main, [str(word) for word in argv])


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return pack_image(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image):
    """The arguments of a comparison that has been made, and its folder."""
    out = tmp_path_factory.mktemp("runs")
    arguments = ["--tasks", "image", "--mechanisms", "fnet,smyrf", "--data", f"image={image}", "--length", 64]
    arguments += [*SMALL, "--out", out]
    assert run(*arguments) == 0
    return arguments, out


def test_every_mechanism_has_a_row(finished):
    record = json.loads((finished[1] / "scores.json").read_text())
    assert [row["mechanism"] for row in record["results"]] == ["fnet", "smyrf"]
    assert record["tasks"]["image"]["train_examples"] == 40 and record["tasks"]["image"]["majority_baseline"] >= 0.5
    assert {"cpu", "threads", "date"} <= record["machine"].keys() and record["seed"] == 0
    for row in record["results"]:
        assert row["steps"] == 5 and row["test_examples"] == 16 and row["cpu_sec"] > 0.5
        assert row["examples_per_sec"] > 0 and row["peak_memory_gib"] > 0.05
        assert record["scores"][row["mechanism"]] == pytest.approx(100 * row["test_accuracy"], abs=0.01)
    fnet, smyrf = record["results"]
    assert smyrf["parameters"] - fnet["parameters"] == 4 * 64 * 64  # the projections, which fnet does not have
    assert smyrf["masked"] and not fnet["masked"] and smyrf["options"]["num_hashes"] == 2
    assert fnet["flags"] == ["--model.norm", "post"] and not smyrf["flags"]


def test_finished_runs_are_not_repeated(finished, monkeypatch, capsys):
    arguments, out = finished
    before = json.loads((out / "scores.json").read_text())
    monkeypatch.setattr(compare_mechanisms, "run_in_process", lambda *_: pytest.fail("trained again"))
    assert run(*arguments) == 0
    again = json.loads((out / "scores.json").read_text())
    assert all(again[part] == before[part] for part in ("tasks", "results", "scores"))
    assert "| fnet |" in capsys.readouterr().out


def test_another_budget_wants_another_folder(finished, capsys):
    arguments, out = finished
    assert run(*arguments, "--train-examples", 50) == 2
    assert f"{out / 'image'} holds runs with train_examples 40, not 50" in capsys.readouterr().err


def test_a_failed_run_is_named_and_the_others_go_on(finished, monkeypatch, capsys):
    arguments, out = finished
    arguments = [*arguments, "--mechanisms", "hrr,fnet"]
    monkeypatch.setattr(compare_mechanisms, "run_in_process", lambda *_: 1)
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert "no result of hrr on image" in captured.err and "| fnet |" in captured.out


def test_a_signal_reaches_the_training(tmp_path):
    """A training that is asked to stop exits with 0 and has no result."""
    ready, code = tmp_path / "ready", "import pathlib, signal, sys, time\n"
    code += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    code += f"pathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)\n"

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(RunError, match="goes on from here"):
        compare_mechanisms.run_in_process([sys.executable, "-c", code], tmp_path / "run", 1)
    assert json.loads((tmp_path / "run" / "usage.jsonl").read_text())["cpu_sec"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "images"], "no task 'images'; there are image, text, listops"),
        (["--mechanisms", "smurf"], "no mechanism 'smurf'; there are bigbird"),
        (["--data", "cifar10.zip"], "--data takes TASK=PATH with one of image, text, listops, not cifar10.zip"),
        (["--tasks", "text"], "text needs its files"),
        (["--train-examples", "0"], "must be at least 1"),
        (["--task", "text"], "did you mean --tasks?"),
    ],
)
def test_wrong_arguments_are_one_line(argv, message, capsys, tmp_path):
    assert run("--out", tmp_path, *argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") <= 2


def test_a_reduced_task_has_examples_of_the_whole(image, tmp_path):
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        write_reduced(path, "image", str(image), 64, SIZES, seed)
    whole, first, again, other = (open_task("image", str(path), 64) for path in (image, *paths))
    for split, size in SIZES.items():
        tokens, labels = (_content(data, split) for data in (first, whole))
        assert len(tokens) == size and tokens <= labels  # each with its label
        assert _content(again, split) == tokens != _content(other, split)


def _content(data, split) -> set[bytes]:
    examples = getattr(data, split)
    rows = examples.rows(np.arange(len(examples)), 64)
    return {bytes([*row, label]) for row, label in zip(rows.tolist(), examples.labels.tolist(), strict=True)}


def test_too_few_examples_are_refused(image, tmp_path):
    with pytest.raises(UserError, match="has 40 test examples, fewer than the 50 asked for"):
        write_reduced(tmp_path / "x.safetensors", "image", str(image), 64, SIZES | {"test": 50}, 0)
    assert not list(Path(tmp_path).iterdir())


def test_tables():
    run = {"parameters": 1000, "cpu_sec": 9.6, "examples_per_sec": 20.4, "peak_memory_gib": 0.5, "test_examples": 100}
    results = [
        {"task": "image", "mechanism": "smyrf", "test_accuracy": 0.2, **run},
        {"task": "image", "mechanism": "dense", "test_accuracy": 0.5, **run},
        {"task": "text", "mechanism": "dense", "test_accuracy": 0.6, **run},
    ]
    tasks = {"image": {"majority_baseline": 0.1}, "text": {"majority_baseline": 0.5}}
    record = {"tasks": tasks, "results": results}
    lines = score_table(record).splitlines()
    assert lines[2:5] == [
        "| dense | 50.0 | 42.44 | 60.0 | 64.27 |",
        "| smyrf | 20.0 | - | not run | - |",
        "| majority class | 10.0 | - | 50.0 | - |",
    ]
    assert lines[-1] == "Standard error of a score at most 5.0 in image, 4.9 in text."
    assert "| dense | 1,000 | 10 | 20 | 0.50 | 1,000 | 10 | 20 | 0.50 |" in cost_table(record)


def test_published_scores_are_of_mechanisms_that_exist():
    assert len(PUBLISHED) == 16 and set(PUBLISHED) == set(available_attention()) - {"smyrf"}
    assert published("luna", "image") == 47.86 and published("luna", "pathx") is published("smyrf", "text") is None
