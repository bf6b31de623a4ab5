"""`hrrformer heatmap`: which pixels the attention of a single-layer image model weighs, drawn beside the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hrrformer.checkpoints import load_classifier
from hrrformer.config import TrainConfig
from hrrformer.heatmaps import draw_heatmaps
from hrrformer.run_setup import fit_to_data, open_data
from runtime.cli import CommandParser
from runtime.errors import UserError

IMAGE_TASKS = ("image", "pathfinder", "pathx")


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.out.suffix != ".png":
        raise UserError(f"--out {arguments.out}: the name must end in .png.")
    classifier, config, _, path = load_classifier(arguments.checkpoint)
    if not can_be_drawn(config):
        raise UserError(
            f"{path} cannot be drawn: it has {config.model.num_layers} layers of {config.attention.name} attention on "
            f"the task {config.task}; needed are one layer, hrr, and one of {', '.join(IMAGE_TASKS)}."
        )
    config = replace(config, data=config.data if arguments.data is None else arguments.data)
    data = open_data(config)
    fit_to_data(config, data)
    split = getattr(data, arguments.split)
    if not all(0 <= example < len(split) for example in arguments.example):
        raise UserError(f"--example: the {arguments.split} split has examples 0 to {len(split) - 1}.")
    tokens = split.rows(torch.tensor(arguments.example), config.model.max_length)  # (B, T)
    with torch.no_grad():
        answers = classifier(tokens).softmax(-1).max(-1)
    weights = classifier.attention_weights(tokens)[0][..., -tokens.shape[1] :]  # without a class token, (B, H, T)
    captions = [
        f"{arguments.split} example {example}: {data.class_names[label]}, recognised as {data.class_names[answer]} "
        f"({share:.0%})"
        for example, label, answer, share in zip(
            arguments.example, split.labels[arguments.example], answers.indices, answers.values, strict=True
        )
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw_heatmaps(tokens, weights, captions).save(arguments.out)
    print(f"{len(captions)} examples: {arguments.out}")


def build_parser() -> CommandParser:
    parser = CommandParser(prog="hrrformer heatmap", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint, or a run directory: its best weights"
    )
    parser.add_argument("--out", type=Path, required=True, help="picture to write, NAME.png")
    parser.add_argument("--example", type=int, nargs="+", default=[0, 1, 2, 3], metavar="N", help="which to draw")
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test", help="where they are from")
    parser.add_argument("--data", help="the task's files (default: those that the checkpoint was trained on)")
    return parser


def can_be_drawn(config: TrainConfig) -> bool:
    """Whether there is one weight for each pixel."""
    return config.task in IMAGE_TASKS and config.model.num_layers == 1 and config.attention.name == "hrr"
