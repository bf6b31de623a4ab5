"""Reference statistics of a data set in a file that refuses to be compared under another protocol."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from runtime.archives import check_npz
from runtime.errors import UserError, of_the_system

DATA_FIELDS = {"data_fingerprint", "split"}


@dataclass(frozen=True)
class FeatureProtocol:
    """All that reference features depend on: two Fréchet distances are comparable only where these are equal.

    Attributes:
        network, weights_hash: the feature network and the hash of its weights.
        resize_rule: how images are brought to the network's input size (`resize.RESIZE_RULES`).
        resolution: of the images, in pixels.
        data_fingerprint: identifies the images of the data set and how they were brought to `resolution`.
        split: the part of the data set: train, val, test, or "all".
    """

    network: str
    weights_hash: str
    resize_rule: str
    resolution: int
    data_fingerprint: str
    split: str

    def digest(self) -> str:
        """16 hexadecimal digits, for file names."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Statistics:
    """Mean float64 (dim,) and covariance float64 (dim, dim) of the features of `count` images, and maybe the features.

    Attributes:
        features: float32 (count, dim), which the kernel distance and the nearest neighbours need; None where not kept.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    protocol: FeatureProtocol
    features: np.ndarray | None = None


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write an .npz file whole or not at all.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    kept = {} if statistics.features is None else {"features": statistics.features}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(
                file,
                mean=statistics.mean,
                covariance=statistics.covariance,
                count=statistics.count,
                **asdict(statistics.protocol),
                **kept,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_statistics(path: str | Path, protocol: FeatureProtocol, of_any_data: bool = False) -> Statistics:
    """Read a file of `save_statistics`.

    Args:
        of_any_data: the file says which data they are of; the rest must be as in `protocol`.

    Raises:
        UserError: the file is missing, damaged, or was made under a protocol other than `protocol`; names what differs.
    """
    path = Path(path)
    try:
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            found = FeatureProtocol(**{field.name: file[field.name].item() for field in fields(FeatureProtocol)})
            mean, covariance, count = np.asarray(file["mean"]), np.asarray(file["covariance"]), int(file["count"])
            features = np.asarray(file["features"]) if "features" in file.files else None
    except FileNotFoundError as error:
        raise UserError(f"no statistics file {path}") from error
    except UserError:
        raise
    except Exception as error:  # not only BadZipFile: every field of a zip and of an array's header has its own
        if of_the_system(error):
            raise
        raise UserError(f"the statistics file {path} is damaged or of another kind: delete it and run again") from error
    compared = {field.name for field in fields(FeatureProtocol)} - (DATA_FIELDS if of_any_data else set())
    differing = [
        f"{name} {getattr(found, name)!r} there, {getattr(protocol, name)!r} asked"
        for name in sorted(compared)
        if getattr(found, name) != getattr(protocol, name)
    ]
    if differing:
        raise UserError(f"the statistics file {path} cannot be used here: {'; '.join(differing)}")
    if not _are_moments(mean, covariance) or count < 2:
        raise UserError(f"the statistics file {path} is damaged: delete it and run again")
    if features is not None and (features.shape != (count, len(mean)) or features.dtype != np.float32):
        raise UserError(f"the statistics file {path} is damaged: delete it and run again")
    return Statistics(mean, covariance, count, found, features)


def _are_moments(mean: np.ndarray, covariance: np.ndarray) -> bool:
    return (
        mean.dtype == covariance.dtype == np.float64
        and mean.ndim == 1
        and covariance.shape == (len(mean), len(mean))
        and bool(np.isfinite(mean).all() and np.isfinite(covariance).all())
    )
