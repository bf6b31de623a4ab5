"""`hrrformer evaluate`: accuracy of a checkpoint, of every class too, the confusion matrix, speed and memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hrrformer.checkpoints import load_classifier
from hrrformer.evaluation import Evaluator, majority_baseline
from hrrformer.run_setup import fit_to_data, open_data
from runtime.checkpoint import write_atomically
from runtime.cli import CommandParser
from runtime.device import open_device
from runtime.errors import UserError


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError("--batch-size must be at least 1.")
    device = open_device(arguments.device)
    classifier, config, tree, path = device.processes.from_main(lambda: load_classifier(arguments.checkpoint))
    config = replace(config, data=config.data if arguments.data is None else arguments.data)
    data = open_data(config, device.processes)
    fit_to_data(config, data)
    split = getattr(data, arguments.split)
    device.put_network(classifier, torch.contiguous_format)
    wanted = arguments.batch_size or config.batch_size // config.accumulation_steps
    batch_size = -(-wanted // device.num_shards) * device.num_shards
    evaluator = Evaluator(classifier, device, batch_size, config.length_buckets, config.precision)
    found = evaluator(split, progress=True)
    baseline, common = majority_baseline(split.labels)
    unused = range(len(split.class_names), len(found.confusion))  # outputs that the data have no class for
    names = [*split.class_names, *(f"output {i}" for i in unused)]
    values = {
        "task": config.task,
        "split": arguments.split,
        "data": data.source,
        "checkpoint": str(path),
        "step": tree["step"],
        "examples": found.examples,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "majority_baseline": baseline,
        "majority_class": split.class_names[common],
        "class_accuracies": dict(zip(names, found.class_accuracies, strict=True)),
        "confusion": found.confusion.tolist(),
        "examples_per_sec": found.examples / found.seconds,
        "peak_memory_gib": device.peak_memory_gib(),
    }
    print(report(values))
    if arguments.out and device.processes.is_main:
        write_atomically(arguments.out, lambda file: file.write((json.dumps(values, indent=2) + "\n").encode()))
        print(f"written to {arguments.out}")


def build_parser() -> CommandParser:
    parser = CommandParser(prog="hrrformer evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint, or a run directory: its best weights"
    )
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test", help="examples to look at")
    parser.add_argument("--data", help="the task's files (default: those that the checkpoint was trained on)")
    parser.add_argument("--batch-size", type=int, help="examples at once (default: as in training)")
    parser.add_argument("--out", type=Path, help="also write the values to this file, as JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or xla")
    return parser


def report(values: dict[str, Any]) -> str:
    """What a person reads; `values` as in the JSON."""
    lines = [
        f"{values['task']}: {values['examples']:,} examples of the {values['split']} split, from {values['data']}",
        f"weights of step {values['step']:,}, {values['checkpoint']}",
        "",
        f"accuracy     {values['accuracy']:.2%}   (majority baseline {values['majority_baseline']:.2%}: "
        f"always {values['majority_class']})",
        f"loss         {values['loss']:.4f}",
        f"examples/s   {values['examples_per_sec']:,.1f}",
        f"peak memory  {values['peak_memory_gib']:.2f} GiB",
        "",
        "confusion: a row for each true class, a column for each answer",
        *confusion_table(values["confusion"], values["class_accuracies"]),
    ]
    return "\n".join(lines)


def confusion_table(confusion: list[list[int]], accuracies: dict[str, float | None]) -> list[str]:
    """Lines of text; the last column is each class's accuracy, None without examples."""
    names = list(accuracies)
    first = max(map(len, names))
    widths = [max(len(name), *(len(str(row[i])) for row in confusion)) for i, name in enumerate(names)]
    header = [f"{name:>{width}}" for name, width in zip(names, widths, strict=True)]
    lines = ["  ".join([" " * first, *header, "accuracy"])]
    for name, row in zip(names, confusion, strict=True):
        cells = [f"{count:>{width}}" for count, width in zip(row, widths, strict=True)]
        accuracy = "-" if accuracies[name] is None else f"{accuracies[name]:.2%}"
        lines.append("  ".join([f"{name:<{first}}", *cells, f"{accuracy:>8}"]))
    return lines
