"""The figure of scores over speed, and the timing of layers that it needs."""

import json

import pytest

from runtime.cli import run_command
from tools import benchmark_attention, benchmark_layers


def scores_file(path, names):
    runs = [{"mechanism": name, "test_accuracy": 0.4, "test_examples": 100} for name in names]
    record = {"tasks": {"image": {}}, "results": runs, "scores": dict.fromkeys(names, 40.0)}
    path.write_text(json.dumps(record))
    return path


def layers_file(path, rows):
    results = [
        {"method": name, "length": length, "pass": "fb", "median_ms": 10.0 + len(name), "peak_growth_mb": 5.0}
        for name, length in rows
    ]
    machine = {"cpu": "a CPU", "gpu": None, "threads": 1, "date": "2026-11-22"}
    path.write_text(
        json.dumps({"machine": machine, "settings": {"device": "cpu", "dtype": "float32"}, "results": results})
    )
    return path


def figure(layers, scores, out):
    return run_command(benchmark_attention.main, ["--figure", str(layers), str(scores), str(out)])


def test_layers_are_timed_and_what_is_too_large_is_left_out(tmp_path, capsys):
    out = tmp_path / "layers.json"
    arguments = ["--mechanisms", "hrr,synthesizer", "--lengths", "32", "--dim", "8", "--num-heads", "2"]
    arguments += ["--repeats", "1", "--memory-limit-gib", "0.00001", "--json", str(out)]
    assert run_command(benchmark_layers.main, arguments) == 0
    record = json.loads(out.read_text())
    assert [row["method"] for row in record["results"]] == ["dense", "hrr"]
    assert record["settings"]["clock"] == "CPU time" and record["settings"]["dim"] == 8
    assert all(row["median_ms"] > 0 and row["length"] == 32 and row["pass"] == "fb" for row in record["results"])
    assert "synthesizer at 32: would need about 0.0 GiB, left out" in capsys.readouterr().err


def test_the_figure_is_drawn_at_the_longest_length_that_all_have(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    rows = [(name, length) for name in ("dense", "hrr") for length in (64, 128)] + [("dense", 256)]
    layers, scores = layers_file(tmp_path / "layers.json", rows), scores_file(tmp_path / "s.json", ["dense", "hrr"])
    closed = []
    monkeypatch.setattr(plt, "close", closed.append)
    assert figure(layers, scores, tmp_path / "figure.png") == 0
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    (axis,) = closed[0].axes
    assert "at 128 tokens" in axis.get_xlabel() and "image" in axis.get_ylabel()
    assert {text.get_text() for text in axis.texts} == {"dense", "hrr"}  # at one place both, yet
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not boxes[0].overlaps(boxes[1])
    plt.close("all")


@pytest.mark.parametrize(
    ("content", "message"),
    [("no JSON", "is no JSON file of results"), ("{}", "must be of tools.benchmark_layers")],
)
def test_wrong_files_are_one_line(content, message, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    wrong = tmp_path / "wrong.json"
    wrong.write_text(content)
    assert figure(wrong, scores_file(tmp_path / "s.json", ["dense"]), tmp_path / "x.png") == 2
    assert message in capsys.readouterr().err


def test_nothing_in_common_is_said(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    layers = layers_file(tmp_path / "layers.json", [("dense", 64)])
    assert figure(layers, scores_file(tmp_path / "s.json", ["hrr"]), tmp_path / "x.png") == 2
    assert "no mechanism has both" in capsys.readouterr().err
