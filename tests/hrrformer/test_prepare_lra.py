"""tools.prepare_lra: the official layouts, whatever the number of workers; interrupted and repeated calls."""

import filecmp
from pathlib import Path

import pytest

from hrrformer.data import open_task
from runtime.cli import run_command
from tools import prepare_lra


def run(capsys, *words):
    """Exit code, what was printed, and the error message."""
    code = run_command(prepare_lra.main, [str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.removeprefix("error: ").strip()


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def test_listops_files_do_not_depend_on_the_workers(tmp_path, capsys):
    options = ("--count", 300, 40, 30, "--min-length", 10, "--max-length", 80)
    code, out, _ = run(capsys, "listops", tmp_path / "one", "--workers", 1, *options)
    assert code == 0 and "300, 40, 30 examples" in out and f"--data {tmp_path / 'one'}" in out
    assert run(capsys, "listops", tmp_path / "two", "--workers", 2, *options)[0] == 0
    names = ["basic_test.tsv", "basic_train.tsv", "basic_val.tsv"]
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two") == names
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)[0] == names
    lines = [(tmp_path / "one" / name).read_text().splitlines() for name in names]
    assert [len(rows) for rows in lines] == [31, 301, 41] and lines[0][0] == "Source\tTarget"
    assert len(set(sum((rows[1:] for rows in lines), []))) == 370
    data = open_task("listops", str(tmp_path / "one"), cache_dir=tmp_path / "cache", progress=False)
    assert len(data.train) == 300 and data.train.lengths.min() > 10 and data.train.lengths.max() < 80


def test_pathfinder_folders_do_not_depend_on_the_workers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_lra, "IMAGES_PER_FOLDER", 30)
    options = ("--count", 70, "--contour-length", 6)
    code, out, _ = run(capsys, "pathfinder", tmp_path / "one", "--workers", 1, *options)
    assert code == 0 and "curv_baseline: 70 images" in out
    assert run(capsys, "pathfinder", tmp_path / "two", "--workers", 2, *options)[0] == 0
    names = files_below(tmp_path / "one")
    assert names == files_below(tmp_path / "two")
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)[0] == names
    table = (tmp_path / "one" / "curv_baseline" / "metadata" / "2.npy").read_text().splitlines()
    assert len(table) == 10 and table[9].split()[:3] == ["imgs/2", "sample_9.png", "9"]
    assert table[9].split()[4:] == ["1.0", "6", "2", "2", "0.5", "1", "1"]
    data = open_task("pathfinder", str(tmp_path / "one" / "curv_baseline"), 0, tmp_path / "cache", progress=False)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [56, 7, 7]


def test_an_interrupted_pathfinder_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_lra, "IMAGES_PER_FOLDER", 10)
    options = ("pathfinder", tmp_path / "set", "--count", 25, "--contour-length", 9, "--workers", 1)
    assert run(capsys, *options)[0] == 0
    folder = tmp_path / "set" / "curv_contour_length_9"
    before = {name: (folder / name).read_bytes() for name in files_below(folder)}
    (folder / "metadata" / "1.npy").unlink()
    (folder / "imgs" / "1" / "sample_4.png").write_bytes(b"half")
    (folder / "imgs" / "0" / "sample_4.png").write_bytes(b"of a finished folder, not drawn again")
    assert run(capsys, *options)[0] == 0
    after = {name: (folder / name).read_bytes() for name in files_below(folder)}
    assert {name for name in before if after[name] != before[name]} == {"imgs/0/sample_4.png"}
    code, _, error = run(capsys, *options, "--seed", 1)
    assert code == 2 and "holds pictures of other settings" in error


def test_files_are_packed_into_one(tmp_path, capsys):
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            (tmp_path / "aclImdb" / split / label).mkdir(parents=True)
            for number in range(10):
                (tmp_path / "aclImdb" / split / label / f"{number}_1.txt").write_text(f"{label} {number}")
    code, out, _ = run(capsys, "text", tmp_path / "imdb.safetensors", "--data", tmp_path / "aclImdb", "--workers", 1)
    assert code == 0 and "20 in test, 20 in train" in out
    assert len(open_task("text", str(tmp_path / "imdb.safetensors")).train) == 18
    code, _, error = run(capsys, "text", tmp_path / "imdb.safetensors", "--data", tmp_path / "aclImdb")
    assert code == 2 and "is already there" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("list", "out"), "unknown task 'list'; tasks are listops, text"),
        (("text", "out"), "text cannot be generated; --data PATH packs its files: the folder aclImdb"),
        (("text", "out", "--data", "."), "the packed file must be named something.safetensors, not out"),
        (("text", "out.safetensors", "--data", "/nowhere"), "/nowhere does not exist. text reads the folder aclImdb"),
        (("listops", "out", "--count", "5"), "--count needs 3 positive numbers here: training, validation and test"),
        (("pathfinder", "out", "--count", "0"), "--count needs 1 positive numbers here: images"),
        (("pathfinder", "out", "--resolution", "48"), "Pathfinder has the resolutions 32, 64, 128, 256, not 48"),
        (("pathfinder", "out", "--contour-length", "7"), "Pathfinder has the contour lengths 6, 9, 14, not 7"),
        (("listops", "out", "--workers", "0"), "--workers must be at least 1, got 0"),
        (("listops", "out", "--sed", "1"), "did you mean --seed?"),
    ],
)
def test_mistakes_end_in_a_line_and_code_2(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, *words)
    assert code == 2 and message in error and "\n" not in error
    assert not any(tmp_path.iterdir())


def test_existing_listops_files_are_kept(tmp_path, capsys):
    (tmp_path / "basic_val.tsv").write_text("mine")
    code, _, error = run(capsys, "listops", tmp_path, "--count", 3, 1, 1)
    assert code == 2 and "basic_val.tsv is already there" in error
    assert files_below(tmp_path) == ["basic_val.tsv"]
