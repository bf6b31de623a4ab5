"""The attention benchmark: what it reports, what it refuses, and where lines cross."""

import json

import pytest

from runtime.cli import run_command
from tools import benchmark_attention
from tools.attention_plots import crossing
from tools.benchmarking import summarise_times

SMALL = ["--lengths", "64", "--repeats", "1", "--threads", "1", "--passes", "fb", "--head-dim", "4"]
CLUSTERS = ["--set", "smyrf.q_cluster_size=16", "--set", "smyrf.k_cluster_size=4"]


def run(*argv):
    return run_command(benchmark_attention.main, list(argv))


def test_a_run_records_every_method_beside_dense(tmp_path, capsys):
    out = tmp_path / "results.json"
    assert run(*SMALL, *CLUSTERS, "--mechanisms", "smyrf-naive,smyrf,linear", "--json", str(out)) == 0
    record = json.loads(out.read_text())
    assert [row["method"] for row in record["results"]] == ["dense", "smyrf-naive", "smyrf", "linear"]
    assert record["settings"]["options"] == {"smyrf": {"q_cluster_size": 16, "k_cluster_size": 4}}
    assert {"cpu", "threads", "date", "omp_wait_policy"} <= record["machine"].keys()
    for row in record["results"]:
        assert row["median_ms"] > 0 and row["check_error"] < 1e-4 and row["keys"] == 16
    by_name = {row["method"]: row for row in record["results"]}
    assert by_name["dense"]["time_ratio"] == 1 and by_name["dense"]["error_to_dense"] < 1e-5
    assert by_name["smyrf"]["error_to_dense"] > 1e-3  # not every query meets every key
    assert by_name["smyrf"]["error_to_dense"] == pytest.approx(by_name["smyrf-naive"]["error_to_dense"], rel=1e-3)


def test_dense_attention_can_stop_at_a_length_and_growth_goes_on(tmp_path, capsys):
    out = tmp_path / "results.json"
    argv = [*SMALL, *CLUSTERS, "--lengths", "64,256", "--dense-up-to", "64", "--mechanisms", "smyrf"]
    assert run(*argv, "--json", str(out), "--plot", str(tmp_path / "lengths.png")) == 0
    record = json.loads(out.read_text())
    found = [(row["method"], row["length"], row["time_ratio"] is None) for row in record["results"]]
    assert found == [("dense", 64, False), ("smyrf", 64, False), ("smyrf", 256, True)]
    assert [(line["method"], line["from"], line["to"]) for line in record["growth"]] == [("smyrf", 64, 256)]
    least = [row["arithmetic_ms"] for row in record["results"] if row["method"] == "smyrf"]
    assert least[1] == pytest.approx(4 * least[0], rel=2e-3) and least[0] > 0


def test_growth_is_the_exponent_of_time_and_memory():
    rows = [
        {"method": "a", "pass": "f", "length": length, "median_ms": length**2, "peak_growth_mb": 3 * length}
        for length in (100, 10, 1000)
    ]
    (line,) = benchmark_attention.growth(rows)
    assert (line["from"], line["to"]) == (10, 1000)
    assert (line["median_ms_exponent"], line["peak_growth_mb_exponent"]) == (2, 1)
    assert benchmark_attention.growth(rows[:1]) == []


def test_a_mechanism_that_fails_its_check_is_not_reported(tmp_path, capsys, monkeypatch):
    """SMYRF that attends in other clusters than its own."""
    original = benchmark_attention.smyrf_attention
    wrong = lambda q, k, v, *args, **options: original(q, k.flip(2), v, *args, **options)  # noqa: E731
    monkeypatch.setattr(benchmark_attention, "smyrf_attention", wrong)
    out = tmp_path / "results.json"
    assert run(*SMALL, *CLUSTERS, "--mechanisms", "smyrf", "--json", str(out)) == 0
    assert [row["method"] for row in json.loads(out.read_text())["results"]] == ["dense"]
    assert "smyrf at 64 tokens is off by" in capsys.readouterr().err


def test_the_naive_twin_takes_the_lengths_that_its_clusters_divide(capsys):
    sizes = ["--set", "smyrf.q_cluster_size=48", "--set", "smyrf.k_cluster_size=12"]
    assert run("--lengths", "32,64", "--repeats", "1", "--passes", "f", *sizes, "--mechanisms", "smyrf-naive") == 0
    captured = capsys.readouterr()
    assert captured.out.count("smyrf-naive") == 1
    assert "smyrf-naive at 64: its clusters of 48 and 12 must divide the lengths" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mechanisms", "smurf"], "no mechanism smurf"),
        (["--set", "smyrf.num_hashes"], "NAME.OPTION=VALUE"),
        (["--set", "smyrf-flash.merge=union"], "no mechanism smyrf-flash"),
        (["--set", "smyrf.num_hash=2", "--lengths", "64"], "the options are num_hashes,"),
        (["--lengths", "64,many"], "many"),
        (["--passes", "b"], "--passes takes f and fb"),
        (["--length", "64"], "did you mean --lengths?"),
    ],
)
def test_wrong_arguments_are_one_line(argv, message, capsys):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


def test_crossing_is_where_a_line_stays_below():
    lengths = [100, 1000, 10000]
    assert crossing(lengths, [10, 10, 10], [1, 10, 100]) == pytest.approx(1000)
    assert crossing(lengths, [10, 31.6227766, 100], [1, 100, 10000]) == pytest.approx(100 * 100 ** (1 / 3), rel=1e-3)
    assert crossing(lengths, [1, 1, 1], [2, 2, 2]) is None  # below from the start
    assert crossing(lengths, [3, 1, 3], [2, 2, 2]) is None  # above at the end


def test_ratios_are_of_the_same_round():
    """A machine that slows down by ten from round to round changes medians, not ratios."""
    rows = summarise_times({"a": [1, 10, 100], "b": [2, 20, 200]}, "a")
    assert rows["b"]["time_ratio"] == 2 and rows["a"]["time_ratio"] == 1
