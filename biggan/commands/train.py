"""`biggan train`: train or resume a run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from biggan.config import TrainConfig
from biggan.gan import build_discriminator, build_generator, images_per_step, steps_for
from biggan.presets import PRESETS, get_preset
from biggan.run_setup import fit_to_data, open_dataset
from biggan.training import train
from runtime.cli import CommandParser
from runtime.config import add_flags, apply_flags, to_dict


def main(argv: Sequence[str]) -> None:
    config, dry_run = parse(argv)
    if dry_run:
        return describe(config)
    run = train(config)
    if not run.processes.is_main:
        return
    program = sys.argv[0] if Path(sys.argv[0]).name == "biggan" else "python -m biggan"
    picture = max((run.folder / "samples").glob("kimg-*.png"), default=None)
    checkpoint = run.checkpoints.paths()[-1]
    if run.step < steps_for(run.config, run.config.total_kimg):
        print(
            f"stopped at {run.step * images_per_step(run.config) / 1000:.1f} kimg and saved {checkpoint}\n"
            f"to resume: {program} train {shlex.join(argv)}"
        )
        return
    print(
        f"checkpoint: {checkpoint}\nsamples:    {picture}\n"
        f"next:       {program} sample --checkpoint {run.folder} --out samples.png\n"
        f"            {program} evaluate --checkpoint {run.folder} --metrics swd --num 2000"
    )


def parse(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The preset with the flags applied, and whether this is a dry run.

    Raises:
        UserError: unknown preset or flag, or a value of a wrong type.
    """
    first = CommandParser(add_help=False)
    first.add_argument("--preset")
    preset = get_preset(first.parse_known_args(argv)[0].preset or "demo")
    parser = CommandParser(prog="biggan train", description="Trains a run, or resumes it when its directory holds one.")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and sizes; write nothing")
    add_flags(parser, preset)
    for action in parser._actions:
        if action.dest == "preset":
            action.help = f"one of {', '.join(PRESETS)}; gives the defaults of all other flags (default: demo)"
    config, parsed = apply_flags(parser, preset, argv)
    return replace(config, out=config.out or f"runs/{config.preset}"), parsed.dry_run


def describe(config: TrainConfig) -> None:
    """What `train` would do; needs the data, if it is there, for the number of classes only."""
    dataset = None
    if config.data:
        dataset = open_dataset(config)
        config = fit_to_data(config, dataset)
    with torch.device("meta"):
        sizes = {"generator": build_generator(config), "discriminator": build_discriminator(config)}
    print(json.dumps(to_dict(config), indent=2))
    for name, network in sizes.items():
        print(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters")
    print(f"data: {f'{len(dataset):,} images from {dataset.source}' if dataset else 'not given (--data PATH)'}")
    print(
        f"steps: {steps_for(config, config.total_kimg):,} of {images_per_step(config)} real images; "
        f"run directory: {Path(config.out)}"
    )
