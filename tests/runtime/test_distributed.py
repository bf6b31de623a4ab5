"""Several processes: what they agree on, which rows of a batch each has, and sums that equal those of one process."""

import processes_program
import pytest
import torch
from launch import ROOT, run_processes

from runtime import distributed
from runtime.checkpoint import BackgroundSaver, CheckpointFolder
from runtime.device import Device, open_device, rows_of_shards
from runtime.distributed import Processes
from runtime.errors import UserError
from runtime.run_log import Progress, RunLog


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    said = run_processes(2, [ROOT / "tests" / "runtime" / "processes_program.py", folder])
    seen = [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(2)]
    return [one | {"said": text} for one, text in zip(seen, said, strict=True)]


def test_processes_know_themselves(two):
    assert [seen["who"] for seen in two] == [(0, 2, True), (1, 2, False)]
    assert ["said once" in seen["said"] for seen in two] == [True, False]


def test_all_stop_at_the_same_call_though_one_was_asked(two):
    assert [seen["asked to stop"] for seen in two] == [[False, False, False, True, False]] * 2


def test_all_get_what_the_main_process_read_or_its_error(two):
    for seen in two:
        assert seen["from main"]["weights"].tolist() == [0, 0]
        assert seen["user error"] == ("UserError", "no such file")
    assert two[0]["defect"] == ("ValueError", "a bug")
    assert two[1]["defect"] == ("RunError", "process 0 failed: ValueError: a bug")


def test_one_process_of_a_machine_makes_what_the_others_find(two):
    assert [seen["found"] for seen in two] == ["made", "found"]
    for key, text in (("first fails", "first"), ("other fails", "other")):
        assert [seen[key] for seen in two] == [("UserError", text)] * 2


def test_rows_are_dealt_and_collected(two):
    assert [seen["rows"].tolist() for seen in two] == [[0, 1], [2, 3]]
    for seen in two:
        assert seen["dealt by hand"] and seen["uneven"][0] == "ValueError"
        assert seen["all rows"].flatten().tolist() == list(range(8)) and seen["all rows"].dtype == torch.uint8
    assert torch.cat([seen["own"] for seen in two]).flatten().tolist() == list(range(8))


def test_sums_and_gradients_are_those_of_one_process(two):
    one = processes_program.sums(Device())
    for seen in two:
        torch.testing.assert_close(seen["mean"], one["mean"])
        torch.testing.assert_close(seen["gradients"], one["gradients"])


def test_one_process_is_all_of_them(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    device = open_device("cpu")
    seen = processes_program.agreements(device, tmp_path)
    assert seen["who"] == (0, 1, True) and seen["asked to stop"] == [False] * 5 and seen["found"] == "made"
    assert device.processes.any(True)
    assert distributed.parts_of_batch() == 1 and distributed.local_process_count() == 1


def test_a_host_has_the_rows_of_its_devices_in_their_order():
    """Of a batch of 8 over 4 devices, a host with the devices 2 and 1."""
    assert rows_of_shards(8, 4, [2, 1]).tolist() == [4, 5, 2, 3]
    hosts = [rows_of_shards(12, 6, shards) for shards in ([0, 3], [1, 4], [5, 2])]
    assert sorted(torch.cat(hosts).tolist()) == list(range(12))
    with pytest.raises(ValueError, match="batch of 9 .* 4 devices"):
        rows_of_shards(9, 4, [0])


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2, but this machine has 1 GPUs"):
        distributed.join_torchrun("cpu:gloo,cuda:nccl")
    with pytest.raises(UserError, match="without torchrun"):
        open_device("xla")


def test_processes_that_do_not_write_leave_no_file(tmp_path):
    saver = BackgroundSaver(CheckpointFolder(tmp_path, "test"), writes=False)
    saver.save(1, {"weights": torch.ones(2)})
    saver.wait()
    log = RunLog(tmp_path, writes=False)
    log.write(1, {"loss": 1.0})
    log.image(1, "samples", torch.zeros(3, 2, 2, dtype=torch.uint8))
    log.close()
    assert not list(tmp_path.iterdir())


def test_progress_is_shown_once(capsys):
    for shows in (True, False):
        progress = Progress(10, 0, "kimg", shows=shows)
        progress.tick("kimg 1.0")
        progress.message("a line")
        progress.close()
    assert capsys.readouterr().err.count("kimg 1.0") == 1


class TwoProcesses(Processes):
    """The second of two, as the device sees them."""

    index, count = 1, 2


def test_a_process_puts_only_its_rows():
    device = Device(TwoProcesses())
    assert device.num_shards == 2 and device.describe().startswith("2 x cpu")
    assert device.put(torch.arange(6), batch_dim=0).tolist() == [3, 4, 5]
    assert device.put(torch.arange(6)).tolist() == list(range(6))
    with pytest.raises(UserError, match="--shard-parameters is for xla"):
        device.put_network(torch.nn.Linear(1, 1), torch.contiguous_format, shard_parameters=True)
