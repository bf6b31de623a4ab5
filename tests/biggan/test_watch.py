"""Signs of collapse: what raises them, what does not, and what a run does then."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from biggan import checkpoints
from biggan.config import GuardConfig
from biggan.data import drawn_faces
from biggan.diversity import Diversity
from biggan.run_setup import fit_to_data
from biggan.training import train
from biggan.watch import Watch
from runtime.checkpoint import load
from runtime.errors import RunError, UserError

LOSSES = {"loss_d_real": 0.5, "loss_d_fake": 0.5}


def observe_all(watch, series):
    return [watch.observe(step, LOSSES | values) for step, values in enumerate(series, 1)]


def test_signs_must_hold_for_some_ticks_in_a_row():
    watch = Watch(GuardConfig(patience=2), "swd")
    losses = [{"loss_d_real": 0.01, "loss_d_fake": x} for x in (0.5, 0.01, 0.5, 0.01, 0.02)]
    assert [bool(signs) for signs in observe_all(watch, losses)] == [False, False, False, False, True]


def test_samples_that_become_alike_are_noticed_and_those_that_never_differed_are_not():
    watch = Watch(GuardConfig(patience=1), "swd")
    found = observe_all(watch, [{"diversity": x} for x in (0.1, 0.2, 0.8, 0.5, 0.39)])
    assert [len(signs) for signs in found] == [0, 0, 0, 0, 1]
    assert "diversity of samples 0.39, was 0.8" in found[-1][0]


@pytest.mark.parametrize(("metric", "values"), [("fid", (30, 20, 29, 31)), ("precision", (0.5, 0.9, 0.61, 0.59))])
def test_a_metric_that_gets_worse_and_the_best_of_it(metric, values):
    watch, best, signs = Watch(GuardConfig(patience=1), metric), [], []
    for step, value in enumerate(values, 1):
        signs.append(watch.observe(step, LOSSES | {f"{metric}5k": value, f"{metric}5k_32": -1.0, "other": 0.0}))
        best.append(watch.is_best(step))
    assert best == [True, True, False, False] and [len(s) for s in signs] == [0, 0, 0, 1]
    again = Watch(GuardConfig(patience=1), metric)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert again.best["step"] == 2 and again.streaks == watch.streaks


def test_diversity_of_few_and_of_equal_images():
    faces = drawn_faces(32, 128).images
    diversity = Diversity(faces[:64])
    others, few = diversity(faces[64:]), diversity(faces[64:68].repeat(16, 1, 1, 1))
    assert all(0.7 < value < 1.4 for value in others.values())
    assert few["diversity_nearest"] == 0 and few["diversity"] < others["diversity"]
    assert set(diversity(faces[:1].expand(64, -1, -1, -1)).values()) == {0.0}
    grey = torch.full_like(faces[:64], 128) + torch.randint(0, 3, (64, 3, 32, 32), dtype=torch.uint8)
    assert max(diversity(grey).values()) < 0.2


def test_a_run_warns_in_its_log_or_stops_with_its_best(tiny_config, capsys, tmp_path):
    log = replace(tiny_config.log, metric_every_ticks=1, metric_images=16)
    guard = GuardConfig(patience=2, min_loss_d=1e9)
    config = replace(tiny_config, log=log, guard=guard)
    train(config)
    lines = [json.loads(line) for line in (Path(config.out) / "stats.jsonl").read_text().splitlines()]
    assert ["warning" in line for line in lines] == [False, True, True, True]
    assert "WARNING: discriminator loss" in capsys.readouterr().err
    assert all(line["diversity"] >= 0 for line in lines)
    best = load(Path(config.out) / "checkpoints" / checkpoints.BEST, checkpoints.KIND)
    assert best["step"] == min(lines, key=lambda line: line["swd16"])["step"]
    assert checkpoints.load_generator(Path(config.out) / "checkpoints" / checkpoints.BEST)

    config = replace(config, out=str(tmp_path / "stopped"), guard=replace(guard, on_collapse="stop"))
    with pytest.raises(RunError, match=r"signs of collapse: discriminator loss.*best was .*best.pt. The newest.* is"):
        train(config)
    assert (Path(config.out) / "checkpoints" / checkpoints.BEST).exists()


def test_a_best_metric_that_is_not_measured_is_refused(tiny_config):
    faces, log = drawn_faces(32, 8), replace(tiny_config.log, metric_every_ticks=1, metrics=("swd", "prdc"))
    for metric in ("", "swd", "recall"):
        fit_to_data(replace(tiny_config, log=log, guard=GuardConfig(best_metric=metric)), faces)
    for changed, metric in ((log, "fid"), (replace(log, metric_every_ticks=0), "swd")):
        with pytest.raises(UserError, match=f"--guard.best-metric {metric} is not measured"):
            fit_to_data(replace(tiny_config, log=changed, guard=GuardConfig(best_metric=metric)), faces)


def test_nothing_is_watched_where_that_is_off(tiny_config):
    config = replace(tiny_config, total_kimg=0.008, guard=GuardConfig(on_collapse="off", patience=1, min_loss_d=1e9))
    train(config)
    (line,) = (Path(config.out) / "stats.jsonl").read_text().splitlines()
    assert "warning" not in line and "diversity" not in line
