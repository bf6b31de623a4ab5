"""Penalties of the discriminator, each headed by its equation. D(x) is the logit of an image x."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_gradients(logits: Tensor, images: Tensor) -> Tensor:
    """||dD(x) / dx||² of each image, differentiable: logits (N,), images (N, 3, R, R) -> (N,).

    Each logit must depend on its own image alone. Half the mean over real images is R1, over generated ones R2.
    Source: Mescheder et al. 2018, arXiv:1801.04406.
    """
    (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradients.square().sum(dim=(1, 2, 3))


def lecam(logits_real: Tensor, logits_fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """E[(D(x) - a_F)²] + E[(D(G(z)) - a_R)²], where a_R and a_F are means of the logits of real and generated images
    in the steps before, without a gradient. Source: Tseng et al. 2021, arXiv:2104.03310."""
    return (logits_real - mean_fake).square().mean() + (logits_fake - mean_real).square().mean()
