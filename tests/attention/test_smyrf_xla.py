"""SMYRF attention on torch-xla's CPU devices: the CPU's numbers, no fallback, no collective, bounded memory."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from launch import ROOT, run

from tests.tolerance import assert_close

pytestmark = [
    pytest.mark.xla,
    pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results and compiled programs of every case, on four devices with the batch divided among them."""
    folder = tmp_path_factory.mktemp("smyrf_xla")
    (folder / "dump").mkdir()
    flags = f"--xla_backend_optimization_level=0 --xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text"
    command = [ROOT / "tests" / "smyrf_xla_program.py", folder / "out.pt", folder / "dump"]
    run(command, PJRT_DEVICE="CPU", CPU_NUM_DEVICES=4, XLA_FLAGS=flags)
    return torch.load(folder / "out.pt")


def program_text(found, case, ending):
    texts = [Path(file).read_text() for file in found["programs"][case] if file.endswith(ending)]
    assert len(texts) == 1
    return texts[0]


def test_equals_the_cpu_without_fallbacks(found):
    from smyrf_xla_program import inputs, outputs_and_gradients

    assert found["fallbacks"] == []
    for name, results in found["results"].items():
        for ours, theirs in zip(results, outputs_and_gradients(name, *inputs(name)), strict=True):
            assert_close(ours, theirs, 1e-4 if name.startswith("long") else None)


def test_a_divided_batch_needs_no_communication(found):
    for case in found["programs"]:
        text = program_text(found, case, "after_optimizations.txt")
        assert "num_partitions=4" in text
        assert not re.search(r" (all-gather|all-reduce|all-to-all|collective-permute)\(", text)


def test_scores_keep_to_the_bound(found):
    """A round's scores are 4 MB on each device; bounded to 256 kB, they no longer show in what the program holds."""
    report = "memory-usage-report.txt"
    free, bounded = (
        int(re.search(r"Total bytes used: (\d+)", program_text(found, case, report))[1])
        for case in ("long", "long and bounded")
    )
    assert bounded < free - 3 * 2**20
