"""`biggan evaluate`: metrics of a checkpoint's generator, or of a folder of samples, against real images."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from biggan import sampling
from biggan.checkpoints import load_generator
from biggan.config import ModelConfig, TrainConfig
from biggan.data import ImageDataset, open_images
from biggan.data.decode import DamagedImage
from biggan.data.sources import open_source
from biggan.metrics.evaluator import evaluate
from biggan.metrics.resize import RESIZE_RULES
from biggan.run_setup import open_dataset
from runtime.cli import CommandParser
from runtime.device import Device, open_device
from runtime.errors import UserError


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if (arguments.checkpoint is None) == (arguments.samples is None):
        raise UserError("give either --checkpoint PATH or --samples DIR.")
    if arguments.num is not None and arguments.num < 2 or arguments.batch_size < 1:
        raise UserError("--num must be at least 2 and --batch-size at least 1.")
    device = open_device(arguments.device)
    prepare = from_samples if arguments.checkpoint is None else from_checkpoint
    batches, num, dataset = device.processes.first_on_each_machine(lambda: prepare(arguments, device))
    values = evaluate(
        batches,
        num,
        dataset,
        arguments.metrics.split(","),
        inception=arguments.inception_weights,
        resize_rule=arguments.resize_rule,
        cache_dir=arguments.cache,
        device=device,
    )
    for name, value in values.items():
        print(f"{name:<12} {value:.4f}")
    if arguments.json and device.processes.is_main:
        arguments.json.write_text(json.dumps({"num": num, "data": dataset.source, **values}, indent=2) + "\n")


def build_parser() -> CommandParser:
    parser = CommandParser(prog="biggan evaluate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint, a run directory or a .safetensors export")
    parser.add_argument("--samples", type=Path, help="a folder or zip of samples")
    parser.add_argument("--data", help="real images (default: the data that the checkpoint was trained on)")
    parser.add_argument("--num", type=int, help="how many samples (default: 50000, or all in --samples)")
    parser.add_argument("--metrics", default="fid,swd", help="metrics, separated by commas")
    parser.add_argument(
        "--inception-weights", type=Path, help="pt_inception-2015-12-05-6726825d.pth or torch-fidelity's file"
    )
    parser.add_argument(
        "--resize-rule", choices=tuple(RESIZE_RULES), default="pytorch-fid", help="how FID resizes images to 299"
    )
    parser.add_argument("--resolution", type=int, help="size to compare --samples at (default: the first sample's)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or raw weights")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--truncation", type=float, help="cut the normal distribution of z off at +-T (default: whole)")
    parser.add_argument("--batch-size", type=int, default=64, help="images computed at once")
    parser.add_argument(
        "--cache", type=Path, default=Path("~/.cache/biggan").expanduser(), help="folder of reference statistics"
    )
    parser.add_argument("--json", type=Path, help="also write the values to this file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or xla")
    return parser


def from_checkpoint(arguments: Namespace, device: Device) -> tuple[Iterator[torch.Tensor], int, ImageDataset]:
    generator, config = load_generator(arguments.checkpoint, arguments.weights)
    dataset = open_dataset(replace(config, data=arguments.data or config.data))
    num = arguments.num or 50000
    z = sampling.latents(0, num, generator.dim_z, arguments.seed, arguments.truncation)
    y = sampling.class_labels(0, num, generator.num_classes, arguments.seed)
    generator.to(device.torch_device)
    return sampling.generate(generator, z, y, device, arguments.seed, min(arguments.batch_size, num)), num, dataset


def from_samples(arguments: Namespace, device: Device) -> tuple[Iterator[torch.Tensor], int, ImageDataset]:
    if not arguments.data:
        raise UserError("--samples needs --data PATH, the real images.")
    resolution = arguments.resolution or first_image_size(arguments.samples)
    samples = open_images(arguments.samples, resolution, labels=False)
    num = arguments.num or len(samples)
    if num > len(samples):
        raise UserError(f"--num {num}: {arguments.samples} holds {len(samples)} images.")
    dataset = open_dataset(TrainConfig(data=arguments.data, model=ModelConfig(resolution=resolution)))
    return samples.images[:num].split(arguments.batch_size), num, dataset


def first_image_size(source: Path) -> int:
    """The smaller side of the first image that can be read."""
    for record in open_source(source):
        try:
            return min(record.open().size)
        except (DamagedImage, OSError):
            continue
    raise UserError(f"no image in {source} can be read.")
