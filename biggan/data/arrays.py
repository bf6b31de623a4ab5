"""Images in a numpy archive, as `biggan sample --out NAME.npz`, BigGAN-PyTorch and guided-diffusion write them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from biggan.data.dataset import ImageDataset
from runtime.archives import check_npz
from runtime.errors import UserError, of_the_system

NAMES = ("x", "arr_0")


def read_npz(path: Path) -> ImageDataset:
    """uint8 images (N, R, R, 3) or (N, 3, R, R), in memory.

    Raises:
        UserError: no such file, a damaged one, or other arrays than these.
    """
    try:
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            name = next((name for name in NAMES if name in file.files), None)
            images = np.asarray(file[name]) if name else np.empty(0)  # numpy gives other members as bytes
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except UserError:
        raise
    except Exception as error:  # not only BadZipFile: every field of a zip and of an array's header has its own
        if of_the_system(error):
            raise
        raise UserError(f"{path} is damaged or is no numpy archive") from error
    if images.ndim == 4 and images.shape[3] == 3:
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if images.dtype != np.uint8 or images.shape[1:] != (3, images.shape[-1], images.shape[-1]) or len(images) == 0:
        raise UserError(
            f"{path} has no uint8 images (N, R, R, 3) or (N, 3, R, R) under {' or '.join(NAMES)}; "
            f"found {images.dtype} {images.shape}"
        )
    fingerprint = hashlib.sha256(images.tobytes()).hexdigest()[:32]
    return ImageDataset(torch.from_numpy(images), source=str(path), fingerprint=fingerprint)
