"""`biggan train --attention NAME` with every mechanism that can stand in a network's attention block."""

import json

import pytest

from attention import available_attention, get_mechanism
from attention.spatial import can_stand
from biggan.commands.train import main

NAMES = [name for name in available_attention() if can_stand(get_mechanism(name)) and name not in ("dense", "smyrf")]
TINY = (
    *("--preset", "demo", "--device", "cpu", "--drawn-faces", "8", "--global-batch-size", "4", "--model.dim-z", "8"),
    *("--model.generator-channels", "4", "--model.discriminator-channels", "4", "--log.grid", "2"),
    *("--total-kimg", "0.008", "--log.kimg-per-tick", "0.004"),
)


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name, tmp_path):
    length = [] if get_mechanism(name).any_length is True else ["--attention.max-length", "256"]
    main([*TINY, "--out", str(tmp_path), "--attention", name, *length])
    lines = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((tmp_path / "config.json").read_text())["attention"]["name"] == name
