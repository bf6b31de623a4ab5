"""Compares `biggan evaluate` with pytorch-fid and torch-fidelity: their numbers, their speed, and the Fréchet step.

    python3 -m venv /tmp/fidenv && /tmp/fidenv/bin/pip install pytorch-fid==0.3.0 torch-fidelity==0.4.0
    python -m tools.benchmark_evaluation --python /tmp/fidenv/bin/python --data ../shared/data/faces128.zip \\
        --num 2000 --json benchmarks/evaluation_cpu.json

The first `--num` photographs of the archive stand for generated images, the next for real ones. All tools get the same
files and one file of weights, drawn by a fixed rule: what is compared is the arithmetic, which is that of the published
weights. Every tool is a process of its own on one thread. Features are kept in `--work`: an interrupted comparison goes
on where it stopped, and with a larger `--num` it adds images. A round of the timing runs each tool once on the same
images; a ratio is the median over rounds of processor seconds, the decoding of JPEG files included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

import numpy as np
import torch

from biggan.data.listing import images_among
from biggan.metrics.frechet import frechet_distance
from biggan.metrics.inception import ConvReLU, FIDInception
from biggan.metrics.inception_score import InceptionScore
from biggan.metrics.inception_weights import load_inception
from biggan.metrics.kid import default_subset_size, kernel_distances
from biggan.metrics.moments import Moments
from biggan.metrics.prdc import precision_recall_density_coverage
from runtime.errors import UserError
from runtime.progress import track
from tools.benchmarking import Worker, describe_machine, write_json
from tools.evaluation_tools import MAX_IMAGES, SIDES, TOOLS

CHUNK = 50
TIMED_IMAGES = 50  # a usual batch; of few images, the weights' way into the cache is a part of the time
WARM_UP_IMAGES = 8
WEIGHTS = Path("hub") / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
THEIRS = {"pytorch-fid": "ours-pytorch-fid", "torch-fidelity": "ours-tensorflow"}
TIMED = (*THEIRS, "ours-tensorflow")
NAMES = {  # torch-fidelity's name -> ours, and the most they may differ
    "frechet_inception_distance": ("fid", 1e-3, "relative"),
    "kernel_inception_distance_mean": ("kid", 1e-6, "absolute"),
    "inception_score_mean": ("is", 1e-4, "absolute"),
    "precision": ("precision", 1e-4, "absolute"),
    "recall": ("recall", 1e-4, "absolute"),
}


class Tool(Worker):
    """The process of one tool, and the features that it has left in `work`."""

    def __init__(self, name: str, python: str, work: Path) -> None:
        super().__init__(name, python, "evaluation_tools.py", work, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        self.work = work

    def has(self, side: str, first: int, last: int) -> bool:
        path = self.work / f"{self.name}-{side}.npy"
        return path.exists() and not np.isnan(np.load(path, mmap_mode="r")[first:last]).any()


def prepare(work: Path, data: Path, num: int) -> None:
    """Weights and image files, where they are not there yet."""
    if not (work / WEIGHTS).exists():
        (work / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
        torch.save(drawn_weights(), work / WEIGHTS)
    with zipfile.ZipFile(data) as archive:
        names = images_among(archive.namelist(), str(data))
        if len(names) < MAX_IMAGES + num:
            raise UserError(f"{data} has {len(names)} images; {MAX_IMAGES + num} are needed")
        for side, first in zip(SIDES, (0, MAX_IMAGES), strict=True):
            (work / side).mkdir(parents=True, exist_ok=True)
            for i in range(num):
                path = work / side / f"{i:05d}.jpg"
                if not path.exists():
                    path.write_bytes(archive.read(names[first + i]))


def drawn_weights() -> dict[str, torch.Tensor]:
    """A weights file of the FID's network, each tensor a function of its name alone."""
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    with torch.device("meta"):
        network = FIDInception()
    for name, layer in network.named_modules():
        if isinstance(layer, ConvReLU):
            shapes[f"{name}.conv.weight"] = tuple(layer.conv.weight.shape)
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{name}.bn.{part}"] = (layer.conv.out_channels,)
    state = {name: _drawn(name, shape) for name, shape in shapes.items()}
    tracked = {name.replace("weight", "num_batches_tracked") for name in shapes if name.endswith("bn.weight")}
    return state | {name: torch.tensor(0) for name in sorted(tracked)}


def _drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("conv.weight"):
        values *= np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("bn.weight"):
        values = 1 + 0.1 * values
    elif name.endswith("running_var"):
        values = np.exp(0.2 * values)
    else:
        values *= 1 / np.sqrt(shape[1]) if name == "fc.weight" else 0.1
    return torch.from_numpy(values.astype(np.float32))


def extract_all(workers: Sequence[Tool], num: int) -> None:
    chunks = [(side, first, min(first + CHUNK, num)) for first in range(0, num, CHUNK) for side in SIDES]
    for chunk in track(chunks, len(chunks), f"features, chunks of {CHUNK} images"):
        for worker in workers:
            if not worker.has(*chunk):
                worker.ask("extract", *chunk)


def our_metrics(work: Path, name: str, num: int, network: FIDInception) -> dict[str, float]:
    generated, real = (torch.from_numpy(np.load(work / f"{name}-{side}.npy")[:num]) for side in SIDES)
    moments = []
    for features in (generated, real):
        moments.append(Moments(features.shape[1]))
        for batch in features.split(64):
            moments[-1].update(batch)
    score = InceptionScore(num, network.num_classes)
    score.update(network.logits(generated, bias=False))
    return {
        "fid": frechet_distance(moments[0].mean, moments[0].covariance, moments[1].mean, moments[1].covariance),
        "kid": float(kernel_distances(generated, real, default_subset_size(num), 100).mean()),
        "is": score.scores().mean().item(),
        **precision_recall_density_coverage(generated, real),
    }


def compare(theirs: dict[str, float], ours: dict[str, float]) -> dict[str, dict[str, Any]]:
    """For each number that both have: the two, their difference, and whether it is within its bound."""
    found = {}
    for name, (our_name, bound, kind) in (NAMES | {"fid": NAMES["frechet_inception_distance"]}).items():
        if name in theirs:
            difference = abs(ours[our_name] - theirs[name]) / (abs(theirs[name]) if kind == "relative" else 1)
            found[our_name] = {"theirs": theirs[name], "ours": ours[our_name], f"{kind}_difference": difference}
            found[our_name] |= {"bound": bound, "within": difference <= bound}
    return found


def time_features(workers: Sequence[Tool], rounds: int) -> dict[str, Any]:
    """Processor seconds an image, and how many times as fast the last one is, by the median over rounds."""
    for worker in workers:
        worker.ask("time", "generated", 0, WARM_UP_IMAGES)
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for index in track(range(rounds), rounds, "timing of the features, rounds"):
        for worker in workers:
            took = worker.ask("time", SIDES[index % 2], 0, TIMED_IMAGES)
            seconds[worker.name].append(took["cpu_sec"] / TIMED_IMAGES)
    *theirs, ours = seconds
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds[ours], strict=True)) for name in theirs
    }
    per_image = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    return {"cpu_sec_per_image": per_image, "times_as_fast_as": {k: round(v, 3) for k, v in ratios.items()}}


def time_frechet(workers: dict[str, Tool], work: Path, dim: int = 2048) -> dict[str, Any]:
    """One Fréchet distance of full rank, by scipy's sqrtm in pytorch-fid and by two roots and singular values."""
    random, moments = np.random.RandomState(0), {}
    for side in (1, 2):
        features = random.standard_normal((2 * dim, dim)) * np.geomspace(1, 1e-2, dim) + random.standard_normal(dim)
        moments |= {f"mean{side}": features.mean(axis=0), f"cov{side}": np.cov(features, rowvar=False)}
    np.savez(work / "moments.npz", **moments)
    answers = {name: workers[name].ask("frechet", work / "moments.npz") for name in ("pytorch-fid", "ours-pytorch-fid")}
    theirs, ours = answers.values()
    return {
        "dim": dim,
        "cpu_sec": {name: round(answer["cpu_sec"], 2) for name, answer in answers.items()},
        "times_as_fast": round(theirs["cpu_sec"] / ours["cpu_sec"], 2),
        "relative_difference": abs(ours["fid"] / theirs["fid"] - 1),
    }


def main(argv: Sequence[str]) -> None:
    args = build_parser().parse_args(argv)
    if not 2 * CHUNK <= args.num <= MAX_IMAGES:
        raise UserError(f"--num takes {2 * CHUNK} to {MAX_IMAGES}")
    prepare(args.work, args.data, args.num)
    pythons = {name: args.python if name in THEIRS else sys.executable for name in TOOLS}
    workers = {name: Tool(name, python, args.work) for name, python in pythons.items()}
    record: dict[str, Any] = {"num": args.num, "machine": describe_machine(1)}
    record["features"] = time_features([workers[name] for name in TIMED], args.rounds)
    record["frechet"] = time_frechet(workers, args.work)
    extract_all(list(workers.values()), args.num)
    network = load_inception(args.work / WEIGHTS)
    record["metrics"] = {
        theirs: compare(workers[theirs].ask("metrics", args.num), our_metrics(args.work, ours, args.num, network))
        for theirs, ours in THEIRS.items()
    }
    for worker in workers.values():
        worker.close()
    print(json.dumps(record, indent=2))
    if args.json:
        write_json(args.json, record)


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m tools.benchmark_evaluation", description=__doc__.split("\n")[0])
    parser.add_argument("--python", required=True, help="the interpreter that has pytorch-fid and torch-fidelity")
    parser.add_argument("--data", type=Path, required=True, help="a zip of photographs")
    parser.add_argument("--work", type=Path, default=Path("/tmp/benchmark_evaluation"), help="folder of features")
    parser.add_argument("--num", type=int, default=2000, help="images on each side")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the timing, 50 images each")
    parser.add_argument("--json", type=Path, help="also write the record to this file")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
