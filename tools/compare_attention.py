"""Samples of one BigGAN checkpoint under dense attention and under another mechanism, side by side.

    python -m tools.compare_attention --checkpoint converted.pt --attention smyrf --attention.num-hashes 4 \\
        --attention.q-cluster-size 256 --attention.k-cluster-size 64 --out compare.png

The same latents and weights make both, so that every difference is the mechanism's. The picture shows the first images
of both and the absolute difference of each pixel (mean of the three colours, of 255); its title has the distances of
the whole sets. Printed beside them are those of the dense samples to themselves, and to dense samples of other latents:
what unrelated images of one network are apart. Without --attention, a checkpoint of SMYRF is compared with dense
attention in its place.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

from torch import Tensor
from torchvision.utils import make_grid

from biggan import pictures
from biggan.checkpoints import read
from biggan.commands.attention_flags import add_attention_flag, choose_attention, parse_with_options
from biggan.config import AttentionConfig
from runtime.errors import UserError
from tools.plotting import check_png, pyplot, save
from tools.sample_sets import SampleSet, add_sampling_flags, choose_features, draw_samples, fix_checkpoint

SHOWN = 16


def describe(attention: AttentionConfig) -> str:
    """'smyrf, num_hashes 4, q_cluster_size 256, k_cluster_size 64'"""
    return ", ".join([attention.name, *(f"{name} {value}" for name, value in attention.options.items())])


def draw(dense: Tensor, other: Tensor, titles: tuple[str, str], distances: str, out: Path) -> None:
    """Grids of two sets uint8 (N, 3, R, R) and of their difference."""
    plt = pyplot()
    count = min(SHOWN, len(dense))
    columns = math.ceil(math.sqrt(count))
    difference = (dense[:count].float() - other[:count].float()).abs().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.6), layout="constrained")
    for axis, images, title in zip(axes, (dense, other), titles, strict=False):
        axis.imshow(pictures.grid(images[:count], columns).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=10)
    shades = make_grid(difference, nrow=columns, padding=2, pad_value=math.nan)[0].numpy()  # the frame stays white
    largest = max(difference.max().item(), 1.0)
    drawn = axes[2].imshow(shades, cmap="magma", vmin=0, vmax=largest, interpolation="nearest")
    axes[2].set_title("difference of each pixel, of 255", fontsize=10)
    figure.colorbar(drawn, ax=axes[2], shrink=0.8)
    for axis in axes:
        axis.axis("off")
    figure.suptitle(distances)
    save(figure, out)


def one_line(distances: Mapping[str, float], features: str) -> str:
    """The distances in words."""
    return (
        f"relative error {distances['relative_error']:.3f}, {distances['grey_levels']:.2f} of 255; "
        f"FD ({features}) {distances['fd']:.4f}, SWD {distances['swd']:.1f}"
    )


def main(argv: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m tools.compare_attention", description=__doc__.splitlines()[0])
    add_sampling_flags(parser, num=512)
    add_attention_flag(parser)
    parser.add_argument("--out", type=Path, required=True, help="picture to write, NAME.png")
    parser.add_argument("--json", type=Path, help="also write the distances to this file")
    arguments, options = parse_with_options(parser, argv)
    check_png(arguments.out)
    fix_checkpoint(arguments)
    own = read(arguments.checkpoint)[0].attention
    attention = choose_attention(arguments.checkpoint, arguments.attention, options) or own
    if attention.name == "dense":
        raise UserError("both sides would be dense: choose the other with --attention, such as --attention smyrf.")
    network = choose_features(arguments)
    dense_config = AttentionConfig("dense", options={})
    (dense, _), (other, share) = draw_samples(arguments, dense_config), draw_samples(arguments, attention)
    unrelated, _ = draw_samples(arguments, dense_config, first=arguments.num)
    dense_set = SampleSet(dense, network)
    distances = dense_set.distances(SampleSet(other, network))
    itself, floor = dense_set.distances(dense_set), dense_set.distances(SampleSet(unrelated, network))
    print(f"{describe(attention)}: {share:.0%} of dense attention's scores")
    print(f"dense and {attention.name}, the same {len(dense)} latents: {one_line(distances, network.name)}")
    print(f"dense and itself: {one_line(itself, network.name)}")
    print(f"dense and dense, other latents: {one_line(floor, network.name)}")
    if arguments.json:
        record = {"attention": describe(attention), "num": len(dense), "features": network.name, "score_share": share}
        distances_of = {"distances": distances, "dense and itself": itself, "unrelated dense samples": floor}
        arguments.json.write_text(json.dumps(record | distances_of, indent=2) + "\n")
    titles = (f"dense (trained with {own.name})", f"{attention.name}, {share:.0%} of the scores, the same weights")
    draw(dense, other, titles, f"{len(dense)} images: {one_line(distances, network.name)}", arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
