"""Image files: single images, grids and arrays."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

from runtime.checkpoint import write_atomically


def grid(images: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 (N, 3, R, R) -> one uint8 image (3, H, W), row by row with a two-pixel white frame."""
    return make_grid(images, nrow=columns, padding=2, pad_value=255)


def save_png(image: torch.Tensor, path: Path) -> None:
    """uint8 (3, H, W). Written whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="png")
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def save_npz(images: torch.Tensor, labels: torch.Tensor, path: Path) -> None:
    """`x`: uint8 (N, R, R, 3), `y`: int64 (N,): BigGAN-PyTorch's names, in the layout most tools read."""
    arrays = {"x": images.permute(0, 2, 3, 1).numpy(), "y": labels.numpy()}
    write_atomically(path, lambda file: np.savez(file, **arrays))
