"""`biggan sample`: images, grids, arrays and interpolation sheets from a checkpoint, a run directory or an export."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from biggan import pictures, sampling
from biggan.checkpoints import load_generator
from biggan.commands.attention_flags import add_attention_flag, choose_attention, parse_with_options
from biggan.generator import Generator
from biggan.standing_statistics import standing_statistics
from runtime.cli import CommandParser
from runtime.device import Device, open_device
from runtime.errors import UserError


def build_parser() -> CommandParser:
    parser = CommandParser(prog="biggan sample", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint, a run directory or a .safetensors export"
    )
    parser.add_argument("--num", type=int, default=64, help="number of images")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="NAME.png: a grid; NAME.npz: arrays x and y; another name: a folder of PNG files",
    )
    parser.add_argument("--seed", type=int, default=0, help="image i of a seed is always the same")
    parser.add_argument("--truncation", type=float, help="cut the normal distribution of z off at +-T (default: whole)")
    parser.add_argument("--classes", help="class numbers, as 0,3,7, taken in turn (default: random)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or raw weights")
    parser.add_argument(
        "--interpolate",
        nargs="?",
        const="z",
        choices=("z", "y", "zy"),
        help="a sheet whose rows go from one image to another: in z, in the class, or in both",
    )
    parser.add_argument(
        "--columns", type=int, help="columns of a grid or steps of an interpolation (default: square; 8)"
    )
    add_attention_flag(parser)
    parser.add_argument(
        "--standing-statistics",
        type=int,
        default=0,
        metavar="BATCHES",
        help="measure batch-norm statistics anew over this many batches (16 is customary); 0 keeps the stored",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images computed at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or xla")
    return parser


def main(argv: Sequence[str]) -> None:
    parser = build_parser()
    arguments, options = parse_with_options(parser, argv)
    _check(arguments)
    device = open_device(arguments.device)
    replacement = choose_attention(arguments.checkpoint, arguments.attention, options)
    generator, _ = load_generator(arguments.checkpoint, arguments.weights, replacement)
    generator.to(device.torch_device)
    if arguments.standing_statistics:
        measure_statistics(generator, device, arguments)
    z, y, columns = choose_latents(generator, arguments)
    batches = sampling.generate(generator, z, y, device, arguments.seed, min(arguments.batch_size, len(z)))
    if not device.processes.is_main:
        for _ in batches:  # it computes its part of each, and the first process writes them
            pass
        return
    write(
        tqdm(batches, total=math.ceil(len(z) / min(arguments.batch_size, len(z))), unit="batch", disable=None),
        y,
        columns,
        arguments.out,
    )
    print(f"{len(z)} images: {arguments.out}")


def choose_latents(generator: Generator, arguments: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """z, y and the number of columns of a grid."""
    if not arguments.interpolate:
        z = sampling.latents(0, arguments.num, generator.dim_z, arguments.seed, arguments.truncation)
        y = sampling.class_labels(
            0, arguments.num, generator.num_classes, arguments.seed, parse_classes(arguments.classes, generator)
        )
        return z, y, arguments.columns or math.ceil(math.sqrt(arguments.num))
    columns = arguments.columns or 8
    try:
        z, y = sampling.interpolation_endpoints(
            math.ceil(arguments.num / columns),
            columns,
            arguments.interpolate,
            generator,
            arguments.seed,
            arguments.truncation,
        )
    except ValueError as error:
        raise UserError(f"--interpolate {arguments.interpolate}: {error}.") from None
    return z, y, columns


def parse_classes(text: str | None, generator: Generator) -> list[int] | None:
    if text is None:
        return None
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--classes: expected numbers separated by commas, got '{text}'.") from None
    if not all(0 <= c < generator.num_classes for c in classes):
        raise UserError(f"--classes: this generator has the classes 0 to {generator.num_classes - 1}.")
    return classes


def measure_statistics(generator: Generator, device: Device, arguments: Any) -> None:
    count, size = arguments.standing_statistics, arguments.batch_size
    size += -size % device.num_shards
    z = sampling.latents(0, count * size, generator.dim_z, arguments.seed + 1, arguments.truncation)
    y = sampling.class_labels(0, count * size, generator.num_classes, arguments.seed + 1)
    device.seed(arguments.seed)
    batches = ([device.put(x[i : i + size], batch_dim=0) for x in (z, y)] for i in range(0, len(z), size))
    standing_statistics(generator, batches, device.compile_step(generator.forward))


def write(batches: Any, y: torch.Tensor, columns: int, out: Path) -> None:
    """A grid, an archive or a folder, by the name; a folder is filled while images come."""
    if out.suffix.lower() in (".png", ".npz"):
        out.parent.mkdir(parents=True, exist_ok=True)
        images = torch.cat(list(batches))
        if out.suffix.lower() == ".png":
            return pictures.save_png(pictures.grid(images, columns), out)
        return pictures.save_npz(
            images, y if not y.is_floating_point() else torch.zeros(len(images), dtype=torch.int64), out
        )
    out.mkdir(parents=True, exist_ok=True)
    number = 0
    for batch in batches:
        for image in batch:
            pictures.save_png(image, out / f"{number:06d}.png")
            number += 1


def _check(arguments: Any) -> None:
    for name in ("num", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")
    if arguments.columns is not None and arguments.columns < 1:
        raise UserError("--columns must be at least 1.")
    if arguments.truncation is not None and not arguments.truncation > 0:
        raise UserError("--truncation must be above 0.")
    if arguments.out.suffix and arguments.out.suffix.lower() not in (".png", ".npz"):
        raise UserError(f"--out {arguments.out}: write .png (a grid), .npz (arrays) or a folder name without a suffix.")
