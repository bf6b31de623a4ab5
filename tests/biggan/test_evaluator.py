"""`evaluate`: names, values, the cache of reference statistics, and what it refuses before an image is generated."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from biggan.data.dataset import ImageDataset
from biggan.metrics.evaluator import evaluate
from biggan.metrics.frechet import frechet_distance
from biggan.metrics.inception_score import InceptionScore
from biggan.metrics.kid import kernel_distances
from biggan.metrics.measures import MetricOptions
from biggan.metrics.prdc import precision_recall_density_coverage
from biggan.metrics.statistics import save_statistics
from biggan.metrics.swd import sliced_wasserstein
from runtime.errors import RunError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:FID of", "ignore:fd50 is of")


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
    results = evaluate(fake.split(16), 50, dataset, ["fid", "swd"], network=Colours(), progress=False)
    assert list(results) == ["fd50", "swd50_32", "swd50_16", "swd50"]
    assert results["fd50"] == pytest.approx(expected_fid(dataset.images, fake), rel=1e-6)
    assert results.protocol["fid"]["reference_count"] == 70
    assert results.protocol["fid"]["resize_rule"] == "pytorch-fid"
    assert results.protocol["swd"]["images_per_side"] == 50


def test_name_of_thousands(dataset: ImageDataset) -> None:
    results = evaluate(images(1, 1000, 32).split(500), 1000, dataset, ["fid", "swd"], network=Colours(), progress=False)
    assert list(results) == ["fd1k", "swd70_32", "swd70_16", "swd70"]  # the data set has no more than 70


def test_swd_compares_as_many_images_of_each_side() -> None:
    real, fake = images(0, 40), images(1, 40) // 2
    results = evaluate(fake.split(7), 40, ImageDataset(real), ["swd"], progress=False)
    assert results["swd40"] == sliced_wasserstein(real, fake)["swd"]


def test_reference_is_computed_once(dataset: ImageDataset, tmp_path: Path) -> None:
    fake, seen, values = images(1, 20), [], []
    for _ in range(2):
        network = Colours()
        values.append(evaluate([fake], 20, dataset, ["fid"], network=network, cache_dir=tmp_path, progress=False))
        seen.append(network.images_seen)
    assert seen == [70 + 20, 20]
    assert values[0] == values[1]
    other_rule = Colours()
    evaluate(
        [fake], 20, dataset, ["fid"], network=other_rule, cache_dir=tmp_path, resize_rule="tensorflow", progress=False
    )
    assert other_rule.images_seen == 70 + 20
    assert len(list(tmp_path.iterdir())) == 2


def test_images_without_a_fingerprint_are_not_cached(tmp_path: Path) -> None:
    nameless = ImageDataset(images(0, 10))
    evaluate([images(1, 5)], 5, nameless, ["fid"], network=Colours(), cache_dir=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_said_so_and_replaced(dataset: ImageDataset, tmp_path: Path) -> None:
    fake = images(1, 20)

    def run() -> float:
        return evaluate([fake], 20, dataset, ["fid"], network=Colours(), cache_dir=tmp_path, progress=False)["fd20"]

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
            [images(1, 20)], 20, dataset, ["fid"], network=Colours(), cache_dir=tmp_path / "file", progress=False
        )
    assert np.isfinite(results["fd20"])


def test_few_images_are_warned_about(dataset: ImageDataset) -> None:
    with pytest.warns(UserWarning, match="FID of 6 images: fewer than 7 leave the covariance singular"):
        results = evaluate([images(1, 6)], 6, dataset, ["fid"], network=Colours(), progress=False)
    assert np.isfinite(results["fd6"])


def never() -> Iterator[torch.Tensor]:
    raise AssertionError("an image was asked for")
    yield


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["fid", "kidd"]}, "unknown metric 'kidd'; choose from fid, kid, is, prdc, swd"),
        ({"metrics": []}, "no metric given; choose from fid, kid, is, prdc, swd"),
        ({"metrics": ["fid"], "num_images": 1}, "at least 2 images"),
        ({"metrics": ["fid"], "network": "fid-inception", "network_weights": "missing.pth"}, "missing.pth"),
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
            network=arguments.get("network", Colours()),
            network_weights=arguments.get("network_weights"),
            progress=False,
        )


def test_misuse_raises(dataset: ImageDataset) -> None:
    def run(batches: list[torch.Tensor], **options: str | dict) -> None:
        evaluate(batches, 20, dataset, ["fid"], network=Colours(), progress=False, **options)

    with pytest.raises(ValueError, match="expected 20 generated images, got 19"):
        run([images(1, 19)])
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\)"):
        run([images(1, 20, 16)])
    with pytest.raises(ValueError, match="uint8"):
        run([images(1, 20).float()])
    with pytest.raises(ValueError, match="pytorch-fid, tensorflow"):
        run([images(1, 20)], resize_rule="bicubic")
    with pytest.raises(ValueError, match="function of the first image's number"):
        run([images(1, 20)], source={})


class ColoursWithClasses(Colours):
    num_classes = 6

    def logits(self, features: torch.Tensor, bias: bool) -> torch.Tensor:
        return features / 20


ALL = ["fid", "kid", "is", "prdc", "swd"]
OPTIONS = MetricOptions(confidence=True, kid_subsets=5, is_splits=3)


def stop_at(image: int, count: int, batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Asks the process to stop while the batch of an image is computed."""
    for batch in batches:
        if count <= image < count + len(batch):
            os.kill(os.getpid(), signal.SIGTERM)
        count += len(batch)
        yield batch


def test_all_metrics(dataset: ImageDataset) -> None:
    fake = images(1, 50)
    with pytest.warns(UserWarning, match="fd50 is of 50 images only: .* are bias"):
        found = evaluate([fake], 50, dataset, ALL, network=ColoursWithClasses(), options=OPTIONS, progress=False)
    fd, kd, score = (["", "_low", "_high", "_infinite"], ["", "_error", "_spread"], ["", "_spread"])
    names = [*(f"fd50{end}" for end in fd), *(f"kd50{end}" for end in kd), *(f"is50{end}" for end in score)]
    names += ["precision50", "recall50", "density50", "coverage50", "swd50_32", "swd50_16", "swd50"]
    assert list(found) == names
    network = ColoursWithClasses()
    real_features, fake_features = network(dataset.images, ""), network(fake, "")
    assert found["fd50"] == pytest.approx(expected_fid(dataset.images, fake), rel=1e-6)
    assert found["fd50_low"] < found["fd50"] < found["fd50_high"] and found["fd50_infinite"] < found["fd50"]
    assert found["kd50"] == pytest.approx(kernel_distances(fake_features, real_features, 25, 5).mean(), rel=1e-9)
    assert found["coverage50"] == precision_recall_density_coverage(fake_features, real_features)["coverage"]
    score = InceptionScore(50, 6, 3)
    score.update(network.logits(fake_features, bias=False))
    assert found["is50"] == pytest.approx(score.scores().mean().item(), rel=1e-9)
    assert found.protocol["kid"]["subset_size"] == 25


@pytest.mark.parametrize("stopped_at", [[0], [23], [41, 49]])
def test_a_stopped_evaluation_goes_on_with_the_same_result(
    dataset: ImageDataset, tmp_path: Path, stopped_at: list[int]
) -> None:
    fake, asked = images(1, 50), []

    def run(cache: Path, stop: int | None = None) -> dict[str, float]:
        def batches(first: int) -> Iterator[torch.Tensor]:
            asked.append(first)
            found = fake[first:].split(8)
            return iter(found) if stop is None else stop_at(stop, first, iter(found))

        arguments = {"options": OPTIONS, "cache_dir": cache, "source": {"images": 1}, "progress": False}
        return dict(evaluate(batches, 50, dataset, ALL, network=ColoursWithClasses(), **arguments))

    whole = run(tmp_path / "whole")
    for image in stopped_at:
        with pytest.raises(RunError, match=r"stopped after \d+ of 50 images"):
            run(tmp_path / "stopped", image)
    assert len(list((tmp_path / "stopped").glob("unfinished-*"))) == 1
    assert run(tmp_path / "stopped") == whole
    assert asked == [0, 0, *(min(50, image // 8 * 8 + 8) for image in stopped_at)]
    assert list((tmp_path / "stopped").glob("unfinished-*")) == []


def test_a_stopped_reference_goes_on(dataset: ImageDataset, tmp_path: Path) -> None:
    class Stopping(Colours):
        def forward(self, images: torch.Tensor, resize_rule: str) -> torch.Tensor:
            if self.images_seen == 32:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(images, resize_rule)

    def run(network: Colours, cache: Path) -> dict[str, float]:
        arguments = {"cache_dir": cache, "source": {"images": 1}, "progress": False}
        return dict(evaluate(lambda first: [images(1, 20)], 20, dataset, ["fid", "prdc"], network=network, **arguments))

    whole = run(Colours(), tmp_path / "whole")
    with pytest.raises(RunError, match="stopped after 64 of 70 images"):
        run(Stopping(), tmp_path / "stopped")
    network = Colours()
    assert run(network, tmp_path / "stopped") == whole
    assert network.images_seen == 6 + 20


def test_damaged_states_start_anew(dataset: ImageDataset, tmp_path: Path) -> None:
    fake = images(1, 50)

    def run(stop: int | None = None) -> dict[str, float]:
        def batches(first: int) -> Iterator[torch.Tensor]:
            return iter(fake[first:].split(8)) if stop is None else stop_at(stop, first, iter(fake[first:].split(8)))

        arguments = {"cache_dir": tmp_path, "source": {"images": 1}, "progress": False}
        return dict(evaluate(batches, 50, dataset, ["kid"], network=Colours(), **arguments))

    whole = run()
    for damage in ("state.pt", "features.npy"):
        with pytest.raises(RunError):
            run(20)
        (path,) = tmp_path.glob(f"unfinished-*/{damage}")
        path.write_bytes(path.read_bytes()[:200])
        if damage == "state.pt":
            with pytest.warns(UserWarning, match="starts anew"):
                assert run() == whole
        else:
            assert run() == whole


def test_statistics_from_a_file(dataset: ImageDataset, tmp_path: Path) -> None:
    fake, path = images(1, 50), tmp_path / "statistics.npz"
    metrics = ["fid", "kid", "prdc"]
    found = evaluate([fake], 50, dataset, metrics, network=Colours(), progress=False)
    save_statistics(path, found.reference)

    def run(metrics: list[str], **options: str) -> dict[str, float]:
        return evaluate([fake], 50, path, metrics, network=Colours(), resolution=32, progress=False, **options)

    assert dict(run(metrics)) == dict(found)
    with pytest.raises(UserError, match="resize_rule 'pytorch-fid' there, 'clean-fid' asked"):
        run(metrics, resize_rule="clean-fid")
    with pytest.raises(UserError, match="swd compares with images"):
        run(["swd"])
    found = evaluate([fake], 50, dataset, ["fid"], network=Colours(), progress=False)
    save_statistics(path, found.reference)
    with pytest.raises(UserError, match="holds no features, which kid and prdc need"):
        run(["kid"])


def test_splits_have_statistics_of_their_own(tmp_path: Path) -> None:
    for split in ("train", "test"):
        dataset = ImageDataset(images(0, 30), source=f"cifar10.zip/{split}", fingerprint="one")
        found = evaluate([images(1, 20)], 20, dataset, ["fid"], network=Colours(), cache_dir=tmp_path, progress=False)
        assert found.protocol["fid"]["split"] == split
    assert len(list(tmp_path.glob("statistics-*"))) == 2


@pytest.mark.parametrize(
    ("metrics", "options", "message"),
    [
        (["is"], {}, "needs the classes of fid-inception, not colours"),
        (["kid"], {"kid_subset_size": 11}, "subsets of 2 to 10 images"),
        (["kid"], {"kid_subsets": 0}, "1 or more subsets"),
    ],
)
def test_options_that_do_not_fit_are_refused_first(metrics: list[str], options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(
            never(),
            10,
            ImageDataset(images(0, 30)),
            metrics,
            network=Colours(),
            options=MetricOptions(**options),
            progress=False,
        )
