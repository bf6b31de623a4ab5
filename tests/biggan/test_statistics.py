"""Streaming moments against numpy, and statistics files that refuse what they were not made for."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from biggan.metrics import statistics
from biggan.metrics.moments import Moments
from biggan.metrics.statistics import FeatureProtocol, Statistics, load_statistics, save_statistics
from runtime.errors import UserError

PROTOCOL = FeatureProtocol("fid-inception", "abc", "pytorch-fid", 64, "faces-1", "all")


def streamed(features: torch.Tensor, batch_sizes: list[int]) -> Moments:
    moments = Moments(features.shape[1])
    for batch in features.split(batch_sizes):
        moments.update(batch)
    return moments


def assert_moments_of(moments: Moments, features: torch.Tensor, rtol: float = 1e-12) -> None:
    features = features.double().numpy()
    assert moments.count == len(features)
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=rtol)
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(moments.covariance, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("batch_sizes", [[100], [1] * 100, [32, 32, 32, 4], [0, 99, 1]])
def test_any_batches_give_the_moments_of_all(batch_sizes: list[int]) -> None:
    features = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
    assert_moments_of(streamed(features, batch_sizes), features)


def test_far_from_the_origin() -> None:
    """Where the mean is 1e6 standard deviations, E[xxᵀ] - E[x]E[x]ᵀ keeps 4 digits of 16; merged deviations keep 10."""
    features = torch.randn(200, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1e6
    assert_moments_of(streamed(features, [50] * 4), features, rtol=1e-9)


def test_merged_parts_equal_the_whole() -> None:
    features = torch.randn(90, 6, generator=torch.Generator().manual_seed(2))
    parts = [streamed(part, [len(part)]) for part in features.split([10, 50, 30])]
    whole = Moments(6)
    for part in [parts[0], Moments(6), parts[1], parts[2]]:
        whole.merge(part)
    assert_moments_of(whole, features)
    assert parts[0].count == 10


def test_continuing_from_a_state_is_exact() -> None:
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
    whole, first = streamed(features, [20, 20, 20]), streamed(features[:20], [20])
    state = first.state_dict()
    first.update(features[:5])  # the state is a copy
    resumed = Moments(4)
    resumed.load_state_dict(state)
    for batch in features[20:].split(20):
        resumed.update(batch)
    assert resumed.count == 60
    assert torch.equal(resumed.mean, whole.mean) and torch.equal(resumed.covariance, whole.covariance)


def test_wrong_features_raise() -> None:
    moments = Moments(4)
    with pytest.raises(ValueError, match=r"\(B, 4\), got \(2, 5\)"):
        moments.update(torch.zeros(2, 5))
    moments.update(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        moments.covariance  # noqa: B018


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "cache" / "statistics.npz"
    save_statistics(path, Statistics(np.arange(3.0), np.eye(3), 100, PROTOCOL))
    return path


def test_round_trip(saved: Path) -> None:
    loaded = load_statistics(saved, PROTOCOL)
    assert np.array_equal(loaded.mean, np.arange(3.0)) and np.array_equal(loaded.covariance, np.eye(3))
    assert (loaded.count, loaded.protocol) == (100, PROTOCOL)
    assert [path.name for path in saved.parent.iterdir()] == ["statistics.npz"]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(FeatureProtocol)])
def test_another_protocol_is_refused_and_named(saved: Path, field: str) -> None:
    asked = dataclasses.replace(PROTOCOL, **{field: 128 if field == "resolution" else "another"})
    with pytest.raises(UserError, match=f"{field} .* there, .* asked"):
        load_statistics(saved, asked)
    assert asked.digest() != PROTOCOL.digest()


def test_damaged_files_are_said_so(saved: Path) -> None:
    whole = saved.read_bytes()
    for damaged in (
        b"",
        b"text",
        whole[: len(whole) // 2],
        whole[:-30],
        whole.replace(b"weights_hash", b"weights_hush"),
    ):
        saved.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            load_statistics(saved, PROTOCOL)
    np.savez(saved, mean=np.array([print], dtype=object), **dataclasses.asdict(PROTOCOL))  # pickled objects stay shut
    with pytest.raises(UserError, match="damaged"):
        load_statistics(saved, PROTOCOL)
    np.save(saved.with_suffix(".npy"), np.zeros(3))
    with pytest.raises(UserError, match="damaged or of another kind"):
        load_statistics(saved.with_suffix(".npy"), PROTOCOL)
    save_statistics(saved, Statistics(np.arange(3.0), np.full((3, 3), np.nan), 100, PROTOCOL))
    with pytest.raises(UserError, match="damaged"):
        load_statistics(saved, PROTOCOL)
    with pytest.raises(UserError, match="no statistics file"):
        load_statistics(saved.parent / "missing.npz", PROTOCOL)


def test_a_failed_write_leaves_the_file_before_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def disk_full(file, **_arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(statistics.np, "savez", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_statistics(saved, Statistics(np.zeros(3), np.eye(3), 7, PROTOCOL))
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["statistics.npz"]
