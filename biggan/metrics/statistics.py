"""Reference statistics of a data set in a file that refuses to be compared under another protocol."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from runtime.errors import UserError


@dataclass(frozen=True)
class FeatureProtocol:
    """All that reference features depend on: two Fréchet distances are comparable only where these are equal.

    Attributes:
        network, weights_hash: the feature network and the hash of its weights.
        resize_rule: how images are brought to the network's input size (`resize.RESIZE_RULES`).
        resolution: of the images, in pixels.
        data_fingerprint: identifies the images of the data set and how they were brought to `resolution`.
    """

    network: str
    weights_hash: str
    resize_rule: str
    resolution: int
    data_fingerprint: str

    def digest(self) -> str:
        """16 hexadecimal digits, for file names."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Statistics:
    """Mean float64 (dim,) and covariance float64 (dim, dim) of the features of `count` images."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    protocol: FeatureProtocol


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write an .npz file whole or not at all.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
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
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_statistics(path: str | Path, protocol: FeatureProtocol) -> Statistics:
    """Read a file of `save_statistics`.

    Raises:
        UserError: the file is missing, damaged, or was made under a protocol other than `protocol`; names what differs.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            found = FeatureProtocol(**{field.name: file[field.name].item() for field in fields(FeatureProtocol)})
            mean, covariance, count = file["mean"], file["covariance"], int(file["count"])
    except FileNotFoundError as error:
        raise UserError(f"no statistics file {path}") from error
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"the statistics file {path} is damaged or of another kind: delete it and run again") from error
    differing = [
        f"{field.name} {getattr(found, field.name)!r} there, {getattr(protocol, field.name)!r} asked"
        for field in fields(FeatureProtocol)
        if getattr(found, field.name) != getattr(protocol, field.name)
    ]
    if differing:
        raise UserError(f"the statistics file {path} cannot be used here: {'; '.join(differing)}")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not np.isfinite(covariance).all() or count < 2:
        raise UserError(f"the statistics file {path} is damaged: delete it and run again")
    return Statistics(mean, covariance, count, found)
