"""Presets: the published parameter counts, round trips, and what is refused."""

from dataclasses import replace

import pytest
import torch

from hrrformer.config import TrainConfig
from hrrformer.model import SequenceClassifier
from hrrformer.presets import PRESETS, get_preset
from runtime.config import from_dict, to_dict
from runtime.errors import UserError

MILLIONS = {
    ("image", "full"): 1.120,
    ("image", "single"): 0.463,
    ("listops", "full"): 9.174,
    ("listops", "single"): 2.614,
    ("text", "full"): 12.997,
    ("text", "single"): 2.495,
    ("retrieval", "full"): 0.428,
    ("retrieval", "single"): 0.181,
    ("pathfinder", "full"): 11.804,
    ("pathfinder", "single"): 7.083,
    ("pathx", "single"): 22.812,
}


def count_millions(config):
    with torch.device("meta"):
        model = SequenceClassifier(config.model, config.attention.name, config.attention.options)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize(("task", "preset"), MILLIONS)
def test_parameter_counts(task, preset):
    assert round(count_millions(get_preset(task, preset)), 3) == MILLIONS[task, preset]


@pytest.mark.parametrize(("length", "millions"), [(256, 0.725), (16384, 4.854)])
def test_parameter_counts_of_malware(length, millions):
    config = get_preset("malware", "single")
    assert round(count_millions(replace(config, model=replace(config.model, max_length=length))), 3) == millions


@pytest.mark.parametrize(("task", "preset"), [(task, preset) for task in PRESETS for preset in PRESETS[task]])
def test_presets_know_their_names_and_come_back_from_json(task, preset):
    config = get_preset(task, preset)
    assert (config.task, config.preset) == (task, preset)
    assert from_dict(TrainConfig, to_dict(config)) == config
    assert f"--task {task}" in PRESETS[task][preset].__doc__
    assert all(0 < length <= config.model.max_length for length in config.length_buckets)
    assert not config.length_buckets or config.model.use_mask and config.model.pooling != "mean"


def test_unknown_names_are_listed():
    with pytest.raises(UserError, match="listops, text, retrieval, image, pathfinder, pathx, malware"):
        get_preset("texts", "single")
    with pytest.raises(UserError, match="single, full"):
        get_preset("text", "huge")
