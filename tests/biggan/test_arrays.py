"""Samples in .npz archives of three programs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from biggan.data.arrays import read_npz
from biggan.pictures import save_npz
from runtime.errors import UserError


def pictures() -> torch.Tensor:
    return torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_archives_of_three_programs(tmp_path: Path) -> None:
    images = pictures()
    save_npz(images, torch.zeros(5, dtype=torch.int64), tmp_path / "ours.npz")
    np.savez(tmp_path / "biggan_pytorch.npz", x=images.numpy(), y=np.zeros(5))
    np.savez(tmp_path / "guided_diffusion.npz", images.permute(0, 2, 3, 1).numpy())
    found = [read_npz(path) for path in sorted(tmp_path.iterdir())]
    assert len(found) == 3
    assert all(torch.equal(dataset.images, images) for dataset in found)
    assert len({dataset.fingerprint for dataset in found}) == 1


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    with pytest.raises(UserError, match="does not exist"):
        read_npz(path)
    path.write_bytes(b"text")
    with pytest.raises(UserError, match="damaged or is no numpy archive"):
        read_npz(path)
    for arrays in ({"x": np.zeros((2, 8, 8, 3))}, {"z": np.zeros(3)}, {"x": np.zeros((0, 8, 8, 3), np.uint8)}):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match="no uint8 images"):
            read_npz(path)
    np.savez(path, x=np.array([print], dtype=object))
    with pytest.raises(UserError, match="damaged"):
        read_npz(path)
