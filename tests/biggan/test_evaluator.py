"""`evaluate`: names, values, the cache of reference statistics, and what it refuses before an image is generated."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from biggan.data.dataset import ImageDataset
from biggan.metrics.evaluator import evaluate
from biggan.metrics.frechet import frechet_distance
from biggan.metrics.swd import sliced_wasserstein
from runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:FID of")


class Colours(nn.Module):
    """A feature network of 6 features that counts its images."""

    name, weights_hash, feature_dim = "colours", "none", 6

    def __init__(self) -> None:
        super().__init__()
        self.images_seen = 0

    def forward(self, images: torch.Tensor, resize_rule: str) -> torch.Tensor:
        self.images_seen += len(images)
        images = images.float()
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def images(seed: int, count: int, resolution: int = 32) -> torch.Tensor:
    shape = (count, 3, resolution, resolution)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def dataset() -> ImageDataset:
    return ImageDataset(images(0, 70), fingerprint="noise-0")


def expected_fid(real: torch.Tensor, fake: torch.Tensor) -> float:
    gaussians = []
    for side in (real, fake):
        features = Colours()(side, "").double().numpy()
        gaussians += [features.mean(axis=0), np.cov(features, rowvar=False)]
    return frechet_distance(*gaussians)


def test_names_and_values(dataset: ImageDataset) -> None:
    fake = images(1, 50)
    results = evaluate(fake.split(16), 50, dataset, ["fid", "swd"], inception=Colours(), progress=False)
    assert list(results) == ["fid50", "swd50_32", "swd50_16", "swd50"]
    assert results["fid50"] == pytest.approx(expected_fid(dataset.images, fake), rel=1e-6)
    assert results.protocol["fid"]["reference_count"] == 70
    assert results.protocol["fid"]["resize_rule"] == "pytorch-fid"
    assert results.protocol["swd"]["images_per_side"] == 50


def test_name_of_thousands(dataset: ImageDataset) -> None:
    results = evaluate(
        images(1, 1000, 32).split(500), 1000, dataset, ["fid", "swd"], inception=Colours(), progress=False
    )
    assert list(results) == ["fid1k", "swd70_32", "swd70_16", "swd70"]  # the data set has no more than 70


def test_swd_compares_as_many_images_of_each_side() -> None:
    real, fake = images(0, 40), images(1, 40) // 2
    results = evaluate(fake.split(7), 40, ImageDataset(real), ["swd"], progress=False)
    assert results["swd40"] == sliced_wasserstein(real, fake)["swd"]


def test_reference_is_computed_once(dataset: ImageDataset, tmp_path: Path) -> None:
    fake, seen, values = images(1, 20), [], []
    for _ in range(2):
        network = Colours()
        values.append(evaluate([fake], 20, dataset, ["fid"], inception=network, cache_dir=tmp_path, progress=False))
        seen.append(network.images_seen)
    assert seen == [70 + 20, 20]
    assert values[0] == values[1]
    other_rule = Colours()
    evaluate(
        [fake], 20, dataset, ["fid"], inception=other_rule, cache_dir=tmp_path, resize_rule="tensorflow", progress=False
    )
    assert other_rule.images_seen == 70 + 20
    assert len(list(tmp_path.iterdir())) == 2


def test_images_without_a_fingerprint_are_not_cached(tmp_path: Path) -> None:
    nameless = ImageDataset(images(0, 10))
    evaluate([images(1, 5)], 5, nameless, ["fid"], inception=Colours(), cache_dir=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_said_so_and_replaced(dataset: ImageDataset, tmp_path: Path) -> None:
    fake = images(1, 20)

    def run() -> float:
        return evaluate([fake], 20, dataset, ["fid"], inception=Colours(), cache_dir=tmp_path, progress=False)["fid20"]

    value = run()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="damaged"):
        assert run() == value
    assert run() == value


def test_a_cache_that_cannot_be_written_does_not_cost_the_result(dataset: ImageDataset, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot cache"):
        results = evaluate(
            [images(1, 20)], 20, dataset, ["fid"], inception=Colours(), cache_dir=tmp_path / "file", progress=False
        )
    assert np.isfinite(results["fid20"])


def test_few_images_are_warned_about(dataset: ImageDataset) -> None:
    with pytest.warns(UserWarning, match="FID of 6 images: fewer than 7 leave the covariance singular"):
        results = evaluate([images(1, 6)], 6, dataset, ["fid"], inception=Colours(), progress=False)
    assert np.isfinite(results["fid6"])


def never() -> Iterator[torch.Tensor]:
    raise AssertionError("an image was asked for")
    yield


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["fid", "kidd"]}, "unknown metric 'kidd'; choose from fid, swd"),
        ({"metrics": []}, "no metric given; choose from fid, swd"),
        ({"metrics": ["fid"], "num_images": 1}, "at least 2 images"),
        ({"metrics": ["fid"], "inception": "missing.pth"}, "missing.pth"),
        ({"metrics": ["swd"], "resolution": 24}, "resolution of 16, 32, 64, ..., got 24"),
    ],
)
def test_what_is_wrong_is_said_before_images_are_generated(arguments: dict, message: str) -> None:
    data = ImageDataset(images(0, 10, arguments.get("resolution", 32)))
    with pytest.raises(UserError, match=message):
        evaluate(
            never(),
            arguments.get("num_images", 10),
            data,
            arguments["metrics"],
            inception=arguments.get("inception", Colours()),
            progress=False,
        )


def test_misuse_raises(dataset: ImageDataset) -> None:
    def run(batches: list[torch.Tensor], **options: str) -> None:
        evaluate(batches, 20, dataset, ["fid"], inception=Colours(), progress=False, **options)

    with pytest.raises(ValueError, match="expected 20 generated images, got 19"):
        run([images(1, 19)])
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\)"):
        run([images(1, 20, 16)])
    with pytest.raises(ValueError, match="uint8"):
        run([images(1, 20).float()])
    with pytest.raises(ValueError, match="pytorch-fid, tensorflow"):
        run([images(1, 20)], resize_rule="bicubic")
