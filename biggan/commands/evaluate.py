"""`biggan evaluate`: metrics of a checkpoint's generator, or of samples, against real images or their statistics."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from biggan import sampling
from biggan.checkpoints import load_generator
from biggan.config import ModelConfig, TrainConfig
from biggan.data import ImageDataset, open_images
from biggan.data.arrays import read_npz
from biggan.data.decode import DamagedImage
from biggan.data.sources import open_source
from biggan.metrics.evaluator import Evaluation, check_metrics, evaluate
from biggan.metrics.inception import FIDInception
from biggan.metrics.measures import MetricOptions
from biggan.metrics.resize import RESIZE_RULES
from biggan.metrics.statistics import save_statistics
from biggan.run_setup import open_dataset
from runtime.checkpoint import checksum
from runtime.cli import CommandParser
from runtime.device import Device, open_device
from runtime.errors import UserError


@dataclass(frozen=True)
class Generated:
    """Generated images, before there are any.

    Attributes:
        batches: from an image number on, a multiple of the batch size.
        source: all that they depend on.
        reference: the data set, or a file of its statistics.
    """

    batches: Callable[[int], Iterable[torch.Tensor]]
    num: int
    resolution: int
    source: dict[str, Any]
    reference: ImageDataset | Path


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)
    check(arguments)
    device = open_device(arguments.device)
    prepare = from_samples if arguments.checkpoint is None else from_checkpoint
    generated = device.processes.first_on_each_machine(lambda: prepare(arguments, device))
    values = evaluate(
        generated.batches,
        generated.num,
        generated.reference,
        arguments.metrics.split(","),
        network=arguments.network,
        network_weights=arguments.network_weights,
        resize_rule=arguments.resize_rule,
        options=MetricOptions(
            confidence=True,
            kid_subset_size=arguments.kid_subset_size,
            kid_subsets=arguments.kid_subsets,
            is_splits=arguments.is_splits,
        ),
        cache_dir=arguments.cache,
        source=generated.source,
        resolution=generated.resolution,
        device=device,
    )
    if device.processes.is_main:
        report(values, generated, arguments)


def build_parser() -> CommandParser:
    parser = CommandParser(prog="biggan evaluate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint, a run directory or a .safetensors export")
    parser.add_argument("--samples", type=Path, help="a folder, zip or .npz of samples")
    parser.add_argument("--data", help="real images (default: the data that the checkpoint was trained on)")
    parser.add_argument("--statistics", type=Path, help="instead of --data, a file of --save-statistics")
    parser.add_argument(
        "--save-statistics", type=Path, help="also write the statistics of the real images to this file"
    )
    parser.add_argument("--num", type=int, help="how many samples (default: 50000, or all in --samples)")
    parser.add_argument("--metrics", default="fid,swd", help="some of fid,kid,is,prdc,swd")
    parser.add_argument(
        "--network",
        default=FIDInception.name,
        help="feature network: fid-inception, torchvision:NAME[@SIZE] or timm:NAME[@SIZE]",
    )
    parser.add_argument(
        "--network-weights",
        "--inception-weights",
        dest="network_weights",
        help="its file, such as pt_inception-2015-12-05-6726825d.pth (default: found in torch's cache or downloaded)",
    )
    parser.add_argument(
        "--resize-rule",
        choices=tuple(RESIZE_RULES),
        help="how images are brought to its size (default: pytorch-fid; clean-fid for torchvision and timm)",
    )
    parser.add_argument("--kid-subset-size", type=int, help="images a subset (default: 1000, or half of a smaller set)")
    parser.add_argument("--kid-subsets", type=int, default=100, help="number of subsets")
    parser.add_argument("--is-splits", type=int, default=10, help="number of parts that have a score each")
    parser.add_argument("--resolution", type=int, help="size to compare --samples at (default: the first sample's)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or raw weights")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--truncation", type=float, help="cut the normal distribution of z off at +-T (default: whole)")
    parser.add_argument("--batch-size", type=int, default=64, help="images computed at once")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/biggan").expanduser(),
        help="folder of reference statistics and of unfinished evaluations",
    )
    parser.add_argument("--json", type=Path, help="also write the values and what they depend on to this file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or xla")
    return parser


def check(arguments: Namespace) -> None:
    """What is wrong with the arguments is said before anything is opened."""
    if (arguments.checkpoint is None) == (arguments.samples is None):
        raise UserError("give either --checkpoint PATH or --samples PATH.")
    if arguments.num is not None and arguments.num < 2 or arguments.batch_size < 1:
        raise UserError("--num must be at least 2 and --batch-size at least 1.")
    if arguments.data and arguments.statistics:
        raise UserError("give either --data PATH or --statistics FILE.")
    if arguments.samples and not arguments.data and not arguments.statistics:
        raise UserError("--samples needs --data PATH, the real images, or --statistics FILE.")
    metrics = arguments.metrics.split(",")
    check_metrics(metrics)
    if arguments.save_statistics and not {"fid", "kid", "prdc"} & set(metrics):
        raise UserError("--save-statistics needs a metric that computes them: fid, kid or prdc.")


def from_checkpoint(arguments: Namespace, device: Device) -> Generated:
    generator, config = load_generator(arguments.checkpoint, arguments.weights)
    reference = arguments.statistics or open_dataset(replace(config, data=arguments.data or config.data))
    num, seed = arguments.num or 50000, arguments.seed
    batch_size = min(arguments.batch_size, num)
    source = {
        **{"generator": checksum(generator.state_dict()), "seed": seed, "truncation": arguments.truncation},
        **{"batch_size": batch_size, "device": device.describe()},
    }
    z = sampling.latents(0, num, generator.dim_z, seed, arguments.truncation)
    y = sampling.class_labels(0, num, generator.num_classes, seed)
    generator.to(device.torch_device)

    def batches(first: int) -> Iterable[torch.Tensor]:
        return sampling.generate(generator, z[first:], y[first:], device, seed, batch_size)

    return Generated(batches, num, config.model.resolution, source, reference)


def from_samples(arguments: Namespace, device: Device) -> Generated:
    if arguments.samples.suffix == ".npz":
        samples = read_npz(arguments.samples)
        resolution = samples.resolution
        if arguments.resolution not in (None, resolution):
            raise UserError(f"--resolution {arguments.resolution}: {arguments.samples} has images of {resolution}.")
    else:
        resolution = arguments.resolution or first_image_size(arguments.samples)
        samples = open_images(arguments.samples, resolution, labels=False)
    num, batch_size = arguments.num or len(samples), arguments.batch_size
    if num > len(samples):
        raise UserError(f"--num {num}: {arguments.samples} holds {len(samples)} images.")
    config = TrainConfig(data=arguments.data or "", model=ModelConfig(resolution=resolution))
    reference = arguments.statistics or open_dataset(config)
    source = {"samples": samples.fingerprint, "batch_size": batch_size, "device": device.describe()}
    return Generated(lambda first: samples.images[first:num].split(batch_size), num, resolution, source, reference)


def first_image_size(source: Path) -> int:
    """The smaller side of the first image that can be read."""
    for record in open_source(source):
        try:
            return min(record.open().size)
        except (DamagedImage, OSError):
            continue
    raise UserError(f"no image in {source} can be read.")


def report(values: Evaluation, generated: Generated, arguments: Namespace) -> None:
    for name, value in values.items():
        print(f"{name:<16} {value:.6g}")
    reference = generated.reference
    data = reference.source if isinstance(reference, ImageDataset) else str(reference)
    if arguments.json:
        record = {"num": generated.num, "data": data, **values, "protocol": values.protocol}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    if arguments.save_statistics:
        save_statistics(arguments.save_statistics, values.reference)
