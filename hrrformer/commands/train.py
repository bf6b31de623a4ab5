"""`hrrformer train`: train or resume a run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hrrformer.checkpoints import BEST
from hrrformer.commands.heatmap import can_be_drawn
from hrrformer.config import TrainConfig
from hrrformer.learner import build_classifier
from hrrformer.phases import phases_of
from hrrformer.presets import PRESETS, get_preset
from hrrformer.run_setup import fit_to_data, open_data
from hrrformer.tasks import TASKS
from hrrformer.training import Run, train
from runtime.cli import CommandParser
from runtime.config import add_flags, apply_flags, to_dict
from runtime.errors import UserError

DEFAULT_TASK = "listops"  # whose values --help shows where no task is given


def main(argv: Sequence[str]) -> None:
    config, dry_run = parse(argv)
    if dry_run:
        return describe(config)
    run, result = train(config)
    program = sys.argv[0] if Path(sys.argv[0]).name == "hrrformer" else "python -m hrrformer"
    if result is None:
        print(
            f"stopped at step {run.step:,} of {run.phases[-1].last:,} and saved {run.checkpoints.paths()[-1]}\n"
            f"to resume: {program} train {shlex.join(argv)}"
        )
    else:
        print(conclusion(run, result, program))


def parse(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The preset with the flags applied, and whether this is a dry run.

    Raises:
        UserError: no or an unknown task, an unknown preset or flag, or a value of a wrong type.
    """
    first = CommandParser(add_help=False)
    first.add_argument("--task")
    first.add_argument("--preset", default="single")
    first.add_argument("-h", "--help", action="store_true")
    chosen = first.parse_known_args(argv)[0]
    if chosen.task is None and not chosen.help:
        raise UserError(f"give --task, one of {', '.join(PRESETS)}.")
    preset = get_preset(chosen.task or DEFAULT_TASK, chosen.preset)
    parser = CommandParser(
        prog="hrrformer train", description="Trains a run, or resumes it when its directory holds one."
    )
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and sizes; train nothing")
    add_flags(parser, preset)
    listed = "; ".join(f"{task}: {', '.join(names)}" for task, names in PRESETS.items())
    for action in parser._actions:
        if action.dest == "task":
            action.help = f"what is learned: {', '.join(PRESETS)}"
        if action.dest == "preset":
            action.help = f"gives the defaults of all other flags; {listed} (default: single)"
    config, parsed = apply_flags(parser, preset, argv)
    out = config.out or f"runs/{config.task}-{config.preset}-{config.attention.name}"
    return replace(config, out=out), parsed.dry_run


def describe(config: TrainConfig) -> None:
    """What `train` would do; the number of steps only where there are data."""
    data = None
    if config.data or TASKS[config.task].generate:
        data = open_data(config)
        config = fit_to_data(config, data)
    with torch.device("meta"):
        classifier = build_classifier(config)
    print(json.dumps(to_dict(config), indent=2))
    print(f"network: {sum(p.numel() for p in classifier.parameters()):,} parameters")
    if data:
        steps = " and ".join(f"{phase.num_steps:,} steps to {phase.name}" for phase in phases_of(config, data))
        print(f"data: {len(data.train):,} examples from {data.source}; {steps}, of {config.batch_size} examples each")
    else:
        print("data: not given (--data PATH)")
    print(f"run directory: {config.out}")


def conclusion(run: Run, result: dict[str, Any], program: str) -> str:
    """Where things are, what came out, and what to do next."""
    lines = [
        f"checkpoint: {run.checkpoints.folder / BEST} (step {result['best_step']:,}, "
        f"validation accuracy {result['validation_accuracy']:.2%})",
        f"test:       accuracy {result['test_accuracy']:.2%} of {result['test_examples']:,} examples, "
        f"loss {result['test_loss']:.3f}; majority baseline {result['test_majority_baseline']:.2%}",
        f"next:       {program} evaluate --checkpoint {run.folder}",
    ]
    if can_be_drawn(run.config):
        lines.append(f"            {program} heatmap --checkpoint {run.folder} --out weights.png")
    return "\n".join(lines)
