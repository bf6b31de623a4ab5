"""What becomes of a BigGAN's images while SMYRF, in the place of its attention, gets less and less memory.

    python -m tools.memory_quality --checkpoint runs/dense --out quality

Nothing is trained: the same weights and latents make every set, which is compared with that of dense attention. Memory
is the number of scores as a share of dense attention's, rounds / clusters where there is one layer. Written are
OUT.json; OUT.png, distances over memory for both merges (dotted: dense samples of other latents, as far apart as
unrelated images of this network are); and OUT-images.png, the same images from row to row at less memory, each row of
the setting with the least error.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

import torch
from torch import Tensor
from tqdm import tqdm

from biggan import pictures
from biggan.checkpoints import load_generator
from biggan.config import AttentionConfig
from runtime.errors import UserError
from tools.plotting import check_png, pyplot, save
from tools.sample_sets import (
    SampleSet,
    add_sampling_flags,
    attention_stages,
    choose_features,
    draw_samples,
    fix_checkpoint,
)

SHOWN = 10  # images in a row of the sheet
AMPLIFIED = 8  # times that the sheet's differences are enlarged
AXES = {"relative_error": "relative error of images", "fd": "Fréchet distance", "swd": "SWD x10³"}


@dataclass(frozen=True)
class Point:
    """One setting of SMYRF; distances as in `SampleSet.distances`."""

    merge: str
    num_hashes: int
    num_clusters: int
    memory: float
    relative_error: float
    grey_levels: float
    fd: float
    swd: float


def settings(arguments: Namespace) -> list[tuple[int, AttentionConfig]]:
    """Numbers of clusters, and SMYRF with every merge and number of rounds that fits; sizes are for the largest layer.

    Raises:
        UserError: numbers that do not divide the keys of that layer; no attention.
    """
    generator, _ = load_generator(arguments.checkpoint, arguments.weights, AttentionConfig("dense", options={}))
    num_queries = max(stage.resolution**2 for stage in attention_stages(generator))
    num_keys = num_queries // 4
    for clusters in arguments.clusters:
        if clusters < 1 or num_keys % clusters:
            raise UserError(f"--clusters {clusters}: the largest layer has {num_keys} keys, which it must divide.")
    if not 1 <= min(arguments.rounds) <= max(arguments.clusters):
        raise UserError("--rounds must be at least 1, and one of them at most the number of clusters.")
    return [
        (clusters, smyrf(rounds, num_queries // clusters, num_keys // clusters, merge))
        for merge in ("multiset", "union")
        for clusters in arguments.clusters
        for rounds in arguments.rounds
        if rounds <= clusters and (rounds > 1 or merge == "multiset")  # of one round both merges are the same
    ]


def smyrf(num_hashes: int, q_cluster_size: int, k_cluster_size: int, merge: str) -> AttentionConfig:
    options = {"num_hashes": num_hashes, "q_cluster_size": q_cluster_size, "k_cluster_size": k_cluster_size}
    return AttentionConfig("smyrf", options=options | {"merge": merge})


def plot(
    points: Sequence[Point], itself: Mapping[str, float], floor: Mapping[str, float], title: str, out: Path
) -> None:
    """A panel for each distance, a line for each merge and number of rounds."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(AXES), figsize=(5 * len(AXES), 4.4), layout="constrained")
    rounds = sorted({point.num_hashes for point in points})
    for axis, (name, label) in zip(axes, AXES.items(), strict=True):
        for merge, num_hashes in dict.fromkeys((point.merge, point.num_hashes) for point in points):
            own = sorted((p.memory, getattr(p, name)) for p in points if (p.merge, p.num_hashes) == (merge, num_hashes))
            style = {"linestyle": "-" if merge == "union" else "--", "color": f"C{rounds.index(num_hashes)}"}
            text = f"{num_hashes} rounds, {merge}" if num_hashes > 1 else "1 round"
            axis.plot(*zip(*own, strict=True), marker="o", label=text, **style)
        axis.axhline(floor[name], color="black", linestyle=":", label="dense, other latents")
        if name == "swd":  # the others are 0 there, and near it where SMYRF is good
            axis.axhline(itself[name], color="grey", linestyle=":", label="dense and itself")
        else:
            axis.set_yscale("log")
        ticks = sorted({point.memory for point in points})
        axis.set(xscale="log", xlabel="scores, share of dense attention's", ylabel=label)
        axis.set_xticks(ticks, [f"{100 * tick:.3g}%" for tick in ticks])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7, loc="upper right", bbox_to_anchor=(1, 0.95))  # below the line of other latents
    figure.suptitle(title)
    save(figure, out)


def draw_sheet(dense: Tensor, rows: Sequence[tuple[str, Tensor]], out: Path) -> None:
    """Dense images uint8 (SHOWN, 3, R, R), then titles and images of settings, each over its difference from dense."""
    plt = pyplot()
    heights = [1.25] + [2.3] * len(rows)
    options = {"figsize": (SHOWN, sum(heights)), "height_ratios": heights, "layout": "constrained"}
    figure, axes = plt.subplots(1 + len(rows), 1, **options)
    panels = [("dense", dense)]
    for title, images in rows:
        difference = (AMPLIFIED * (images.float() - dense.float()).abs()).clamp(max=255).to(torch.uint8)
        panels.append((f"{title}; below, {AMPLIFIED} times the difference", torch.cat([images, difference])))
    for axis, (title, images) in zip(axes, panels, strict=True):
        axis.imshow(pictures.grid(images, len(dense)).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    save(figure, out)


def best_by_memory(points: Sequence[Point]) -> list[int]:
    """Positions of the points with the least error at each memory, most memory first."""
    best: dict[float, int] = {}
    for i, point in enumerate(points):
        if point.memory not in best or point.relative_error < points[best[point.memory]].relative_error:
            best[point.memory] = i
    return [best[memory] for memory in sorted(best, reverse=True)]


def main(argv: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m tools.memory_quality", description=__doc__.splitlines()[0])
    add_sampling_flags(parser, num=512)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2, 4], help="hash rounds")
    parser.add_argument("--clusters", type=int, nargs="+", default=[2, 4, 8, 16], help="clusters a round")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json, OUT.png and OUT-images.png are written")
    arguments = parser.parse_args(argv)
    out = arguments.out.with_suffix(".png")
    check_png(out)
    fix_checkpoint(arguments)
    network = choose_features(arguments)
    tried = settings(arguments)
    dense_config = AttentionConfig("dense", options={})
    dense, other = (SampleSet(draw_samples(arguments, dense_config, first)[0], network) for first in (0, arguments.num))
    itself, floor = dense.distances(dense), dense.distances(other)
    points, images = [], []
    for clusters, attention in tqdm(tried, unit="setting", disable=None):
        samples, memory = draw_samples(arguments, attention)
        distances = dense.distances(SampleSet(samples, network))
        options = attention.options
        points.append(Point(options["merge"], options["num_hashes"], clusters, memory, **distances))
        images.append(samples[:SHOWN])
    for point in points:
        print(", ".join(f"{name} {value:.4g}" if name != "merge" else value for name, value in asdict(point).items()))
    record = {"num": arguments.num, "seed": arguments.seed, "features": network.name, "torch": torch.__version__}
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = {"dense and itself": itself, "unrelated dense samples": floor, "points": [asdict(point) for point in points]}
    out.with_suffix(".json").write_text(json.dumps(record | rows, indent=1) + "\n")
    plot(points, itself, floor, f"SMYRF in a trained generator, {arguments.num} images, FD of {network.name}", out)
    sheet = []
    for i in best_by_memory(points):
        point = points[i]
        rounds = "1 round" if point.num_hashes == 1 else f"{point.num_hashes} rounds, {point.merge}"
        sheet.append((f"{100 * point.memory:.3g}% of the scores, {rounds}", images[i]))
    draw_sheet(dense.images[:SHOWN], sheet, out.with_name(f"{out.stem}-images.png"))
    print(f"wrote {out.with_suffix('.json')}, {out} and {out.stem}-images.png")


if __name__ == "__main__":
    sys.exit(run_command(main))
