"""pytorch-fid, torch-fidelity and this project's network as workers of `tools.benchmark_evaluation`.

    python tools/evaluation_tools.py NAME FOLDER

runs in the interpreter that has the tool installed. FOLDER holds the images, `generated/NNNNN.jpg` and `real/`, and the
weights in `hub/checkpoints/`, where pytorch-fid looks for them. A line of standard input is one order, a line of JSON
the answer:

    extract SIDE FIRST LAST    features of the images FIRST .. LAST - 1 into NAME-SIDE.npy
    time SIDE FIRST LAST       the same, but not kept; {"cpu_sec": ..., "wall_sec": ...} as above
    metrics COUNT              the tool's own metrics of the first COUNT images of each side, from those files
    frechet FILE               the tool's Fréchet distance of the moments in an .npz; {"fid": ..., "cpu_sec": ...}
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIDES = ("generated", "real")
MAX_IMAGES = 2000
NEIGHBOURS = 3
FIDELITY_OPTIONS = {"verbose": False, "save_cpu_ram": True, "prc_neighborhood": NEIGHBOURS, "rng_seed": 2020}


class PytorchFid:
    """pytorch-fid 0.3.0."""

    widths = (2048,)

    def __init__(self, folder: Path) -> None:
        os.environ["TORCH_HOME"] = str(folder)
        from pytorch_fid import fid_score, inception

        self.score = fid_score
        self.network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()

    def extract(self, paths: list[Path]) -> np.ndarray:
        return self.score.get_activations(paths, self.network, batch_size=50, num_workers=0)

    def frechet(self, mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
        return float(self.score.calculate_frechet_distance(mean1, cov1, mean2, cov2))

    def metrics(self, sides: dict[str, np.ndarray]) -> dict[str, float]:
        moments = [part for x in sides.values() for part in (x.mean(0, dtype=np.float64), np.cov(x, rowvar=False))]
        return {"fid": self.frechet(*moments)}


class TorchFidelity:
    """torch-fidelity 0.4.0, all metrics from the FID-Inception network."""

    widths = (2048, 1008)

    def __init__(self, folder: Path) -> None:
        from torch_fidelity.utils import create_feature_extractor

        weights = folder / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
        self.network = create_feature_extractor(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            cuda=False,
            feature_extractor_weights_path=str(weights),
            **FIDELITY_OPTIONS,
        )

    def extract(self, paths: list[Path]) -> np.ndarray:
        from torch_fidelity.datasets import ImagesPathDataset
        from torch_fidelity.utils import get_featuresdict_from_dataset

        images = ImagesPathDataset([str(path) for path in paths])
        features = get_featuresdict_from_dataset(images, self.network, 50, False, True, False)
        return np.concatenate([features["2048"].numpy(), features["logits_unbiased"].numpy()], axis=1)

    def metrics(self, sides: dict[str, np.ndarray]) -> dict[str, float]:
        from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

        generated, real = (torch.from_numpy(np.ascontiguousarray(x[:, :2048])) for x in sides.values())
        logits = torch.from_numpy(np.ascontiguousarray(sides["generated"][:, 2048:]))
        size = min(1000, len(generated) // 2)
        statistics = [metric_fid.fid_features_to_statistics(x) for x in (generated, real)]
        return {
            **metric_fid.fid_statistics_to_metric(*statistics, False),
            **metric_kid.kid_features_to_metric(generated, real, kid_subset_size=size, **FIDELITY_OPTIONS),
            **metric_isc.isc_features_to_metric(logits),
            **metric_prc.prc_features_to_metric(generated, real, **FIDELITY_OPTIONS),
        }


class Ours:
    """The network of biggan.metrics.inception under one of the resize rules; the caller computes the metrics."""

    widths = (2048,)

    def __init__(self, folder: Path, rule: str) -> None:
        from biggan.metrics.inception_weights import load_inception

        self.network = load_inception(folder / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth")
        self.rule = rule

    def extract(self, paths: list[Path]) -> np.ndarray:
        from PIL import Image

        from biggan.data.decode import square_rgb

        images = torch.from_numpy(np.stack([square_rgb(Image.open(path), 128) for path in paths]))
        return torch.cat([self.network(batch, self.rule) for batch in images.split(50)]).numpy()

    def frechet(self, mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
        from biggan.metrics.frechet import frechet_distance

        return frechet_distance(mean1, cov1, mean2, cov2)


TOOLS = {
    "pytorch-fid": PytorchFid,
    "torch-fidelity": TorchFidelity,
    "ours-pytorch-fid": lambda folder: Ours(folder, "pytorch-fid"),
    "ours-tensorflow": lambda folder: Ours(folder, "tensorflow"),
}


def features_file(folder: Path, name: str, side: str, width: int) -> np.ndarray:
    """The memory-mapped array (MAX_IMAGES, width), NaN where nothing was written yet."""
    path = folder / f"{name}-{side}.npy"
    if not path.exists():
        np.save(path, np.full((MAX_IMAGES, width), np.nan, dtype=np.float32))
    return np.load(path, mmap_mode="r+")


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main(name: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # the tools print to it
    torch.set_num_threads(1)
    tool = TOOLS[name](folder)
    for line in sys.stdin:
        order, *arguments = line.split()
        cpu, wall = cpu_seconds(), time.monotonic()
        answer = getattr(Orders, order)(tool, name, folder, *arguments)
        took = {"cpu_sec": cpu_seconds() - cpu, "wall_sec": time.monotonic() - wall}
        print(json.dumps(answer | took), file=answers, flush=True)


class Orders:
    """What a worker can be asked for."""

    @staticmethod
    def time(tool: Any, name: str, folder: Path, side: str, first: str, last: str) -> dict[str, float]:
        tool.extract([folder / side / f"{i:05d}.jpg" for i in range(int(first), int(last))])
        return {}

    @staticmethod
    def extract(tool: Any, name: str, folder: Path, side: str, first: str, last: str) -> dict[str, float]:
        features = tool.extract([folder / side / f"{i:05d}.jpg" for i in range(int(first), int(last))])
        features_file(folder, name, side, features.shape[1])[int(first) : int(last)] = features
        return {}

    @staticmethod
    def metrics(tool: Any, name: str, folder: Path, count: str) -> dict[str, float]:
        width = sum(tool.widths)
        return tool.metrics({s: np.array(features_file(folder, name, s, width)[: int(count)]) for s in SIDES})

    @staticmethod
    def frechet(tool: Any, name: str, folder: Path, file: str) -> dict[str, float]:
        with np.load(file) as moments:
            return {"fid": tool.frechet(*(moments[key] for key in ("mean1", "cov1", "mean2", "cov2")))}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
