"""The log: no line twice, none lost, numbers that JSON knows."""

import json

import torch

from runtime.run_log import RunLog, RunningMeans


def lines(folder):
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    log = RunLog(tmp_path)
    for step in (10, 20, 30):
        log.write(step, {"loss": step / 10})
    log.close()
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    log = RunLog(tmp_path, step_at_start=20)
    log.write(30, {"loss": float("nan")})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]
    assert lines(tmp_path)[-1]["loss"] == "nan"


def test_damaged_lines_are_dropped_when_a_run_resumes(tmp_path):
    RunLog(tmp_path).close()
    damaged = [b"\xff\xfe", b"[" * 100_000, b"[1]", b'{"step": "x"}', b"7", b""]
    (tmp_path / "stats.jsonl").write_bytes(b"\n".join([*damaged, b'{"step": 10}', *damaged]))
    RunLog(tmp_path, step_at_start=20).close()
    assert lines(tmp_path) == [{"step": 10}]


def test_running_means_continue_from_their_state():
    whole, first, second = (RunningMeans(["x"], torch.clone) for _ in range(3))
    values = torch.arange(6.0)
    for value in values:
        whole.add({"x": value})
    for value in values[:2]:
        first.add({"x": value})
    second.load_state_dict(first.state_dict())
    for value in values[2:]:
        second.add({"x": value})
    assert second.take()() == whole.take()() == {"x": 2.5}


def test_means_that_are_read_late_are_those_of_their_tick():
    means = RunningMeans(["x"], torch.clone)
    means.add({"x": torch.tensor(1.0)})
    read = means.take()
    means.add({"x": torch.tensor(5.0)})
    assert read() == {"x": 1.0} and means.take()() == {"x": 5.0}
