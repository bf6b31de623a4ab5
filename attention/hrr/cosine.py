"""The cosine of two vectors and its gradient, in as few passes over memory as torch's operators allow.

Shared by the loops over chunks of tokens; every tensor here is one chunk, which stays in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-18  # the square of a norm below it is no normal float32: such a vector counts as zero, and its cosine as 0


def inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| over the last dimension; 0 for a vector of zeros, with gradient 0."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    return norm.masked_fill(norm <= TINY, torch.inf).reciprocal()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """x·y / (|x| |y|) over the last dimension, (..., D) -> (...)."""
    # One factor after the other: the product of two small norms could vanish.
    return (x * y).sum(-1) * inverse_norm(x) * inverse_norm(y)


def add_cosine_gradient(grad: Tensor, x: Tensor, y: Tensor, grad_x: Tensor, grad_y: Tensor) -> None:
    """Given the gradient (...) of cosine(x, y), adds that of x to grad_x (..., D) and writes that of y to grad_y.

    d cos / dx = y / (|x| |y|) - cos x / |x|², and the same with x and y exchanged.
    """
    inverse_x, inverse_y = inverse_norm(x), inverse_norm(y)
    cos = torch.mul(x, y, out=grad_y).sum(-1).mul_(inverse_x).mul_(inverse_y)
    across = (grad * inverse_x * inverse_y).unsqueeze(-1)
    along_x = (grad * cos * inverse_x * inverse_x).unsqueeze(-1)
    along_y = (grad * cos * inverse_y * inverse_y).unsqueeze(-1)
    torch.mul(x, across, out=grad_y).addcmul_(y, along_y, value=-1)
    grad_x.addcmul_(y, across).addcmul_(x, along_x, value=-1)
