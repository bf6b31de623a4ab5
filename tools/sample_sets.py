"""Sample sets of one generator under different attention mechanisms, and how far apart they are."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import SmyrfAttention
from biggan import sampling
from biggan.blocks import Stage
from biggan.checkpoints import KIND, load_generator
from biggan.config import AttentionConfig
from biggan.generator import Generator
from biggan.metrics.frechet import frechet_distance
from biggan.metrics.moments import Moments
from biggan.metrics.networks import FeatureNetwork, default_resize_rule, load_network
from biggan.metrics.swd import sliced_wasserstein
from runtime.cli import CommandParser
from runtime.device import open_device
from runtime.errors import UserError
from runtime.run_folder import read_checkpoint

FEATURE_BATCH = 32


class Pixels:
    """A feature network without weights: the mean colours of 8x8 squares, 0..1. See `FeatureNetwork`."""

    name, weights_hash, feature_dim = "pixels 8x8", "", 192

    def __call__(self, images: Tensor, resize_rule: str) -> Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)


class SampleSet:
    """Images uint8 (N, 3, R, R) of the latents 0 .. N - 1 of a seed, and the moments of their features."""

    def __init__(self, images: Tensor, network: FeatureNetwork) -> None:
        self.images = images
        self.moments = Moments(network.feature_dim)
        rule = default_resize_rule(network)
        with torch.no_grad():
            for batch in images.split(FEATURE_BATCH):
                self.moments.update(network(batch, rule))

    def distances(self, other: SampleSet) -> dict[str, float]:
        """relative_error, grey_levels: of paired images; fd, swd: of the sets.

        `relative_error` is the root mean square difference over the root mean square deviation of these images from
        their mean: 0 for equal images, about 1.4 for unrelated ones. `grey_levels` is the mean absolute difference of
        a colour of 0..255. `fd` is the Fréchet distance of the features, `swd` the sliced Wasserstein distance x10³;
        it looks at random patches of either set, and is above 0 for a set and itself.
        """
        ours, theirs = self.images.float(), other.images.float()
        fd = frechet_distance(self.moments.mean, self.moments.covariance, other.moments.mean, other.moments.covariance)
        spread = (ours - ours.mean(0)).square().mean().sqrt()
        return {
            "relative_error": ((ours - theirs).square().mean().sqrt() / spread.clamp_min(1e-9)).item(),
            "grey_levels": (ours - theirs).abs().mean().item(),
            "fd": max(fd, 0.0),  # rounding takes that of equal sets below
            "swd": sliced_wasserstein(self.images, other.images)["swd"],
        }


def add_sampling_flags(parser: CommandParser, num: int) -> None:
    """The flags that `draw_samples` and `choose_features` read."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="of biggan: a file, a run directory or an export"
    )
    parser.add_argument("--num", type=int, default=num, help="images in each set")
    parser.add_argument("--seed", type=int, default=0, help="of the latents and of the hash directions")
    parser.add_argument("--truncation", type=float, help="cut the normal distribution of z off at +-T (default: whole)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or raw weights")
    parser.add_argument("--batch-size", type=int, default=32, help="images computed at once")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--features",
        default="pixels",
        metavar="NAME",
        help="what the Fréchet distance compares: pixels (8x8 mean colours, no network), fid-inception, or another "
        "network as torchvision:NAME or timm:NAME",
    )
    parser.add_argument("--feature-weights", type=Path, help="weights of that network (default: its usual ones)")


def choose_features(arguments: Namespace) -> FeatureNetwork:
    """Raises UserError where there is no such network, or too few images for its number of features."""
    network = (
        Pixels() if arguments.features == "pixels" else load_network(arguments.features, arguments.feature_weights)
    )
    if arguments.num <= network.feature_dim:
        print(
            f"note: {arguments.num} images for {network.feature_dim} features bias the Fréchet distance upwards; "
            "compare it with the distance of unrelated samples alone"
        )
    return network


def fix_checkpoint(arguments: Namespace) -> None:
    """Replaces a run directory by its newest checkpoint: all sets are of these weights, even where the run goes on."""
    if arguments.checkpoint.is_dir():
        arguments.checkpoint = read_checkpoint(arguments.checkpoint, KIND)[0]


def draw_samples(arguments: Namespace, attention: AttentionConfig | None, first: int = 0) -> tuple[Tensor, float]:
    """Images uint8 (N, 3, R, R) of the latents `first`, `first + 1`, … under a mechanism, and its `score_share`."""
    if arguments.num < 2 or arguments.batch_size < 1:
        raise UserError("--num must be at least 2 and --batch-size at least 1.")
    if arguments.truncation is not None and not arguments.truncation > 0:
        raise UserError("--truncation must be above 0.")
    generator, _ = load_generator(arguments.checkpoint, arguments.weights, attention)
    device = open_device(arguments.device)
    share = score_share(generator)
    generator.to(device.torch_device)
    z = sampling.latents(first, arguments.num, generator.dim_z, arguments.seed, arguments.truncation)
    y = sampling.class_labels(first, arguments.num, generator.num_classes, arguments.seed)
    batches = sampling.generate(generator, z, y, device, arguments.seed, min(arguments.batch_size, arguments.num))
    return torch.cat(list(batches)), share


def attention_stages(generator: Generator) -> list[Stage]:
    """UserError where there are none."""
    stages = [stage for stage in generator.blocks if stage.attention is not None]
    if not stages:
        raise UserError("this generator has no attention, so there is nothing to exchange.")
    return stages


def score_share(generator: Generator) -> float:
    """Scores that SMYRF computes, as a share of dense attention's, over all layers; 1 for other mechanisms."""
    scores = dense = 0
    for stage in attention_stages(generator):
        num_queries, num_keys = stage.resolution**2, stage.resolution**2 // 4
        mechanism = stage.attention.attention
        keys = num_keys
        if isinstance(mechanism, SmyrfAttention):
            keys = mechanism.num_hashes * min(mechanism.k_cluster_size, num_keys)
        scores, dense = scores + num_queries * keys, dense + num_queries * num_keys
    return scores / dense
