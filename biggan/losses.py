"""Adversarial losses, each headed by its equation, and the gradient of orthogonal regularisation.

Logits are of any shape; losses are scalars. D is the discriminator's logit of an image, G(z) a generated image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> tuple[Tensor, Tensor]:
    """E[max(0, 1 - D(x))] and E[max(0, 1 + D(G(z)))]; the loss is their sum. Lim and Ye 2017, arXiv:1705.02894."""
    return F.relu(1 - logits_real).mean(), F.relu(1 + logits_fake).mean()


def hinge_generator_loss(logits_fake: Tensor) -> Tensor:
    """-E[D(G(z))]."""
    return -logits_fake.mean()


def nonsaturating_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> tuple[Tensor, Tensor]:
    """-E[log s(D(x))] and -E[log(1 - s(D(G(z))))] with the logistic s. Goodfellow et al. 2014, arXiv:1406.2661."""
    return F.softplus(-logits_real).mean(), F.softplus(logits_fake).mean()


def nonsaturating_generator_loss(logits_fake: Tensor) -> Tensor:
    """-E[log s(D(G(z)))]."""
    return F.softplus(-logits_fake).mean()


def relativistic_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> tuple[Tensor, Tensor]:
    """E[softplus(D(G(z)) - D(x))] over pairs of a generated and a real image, half of it for each side.

    Sources: Jolicoeur-Martineau 2018, arXiv:1807.00734; Huang et al. 2024 (R3GAN), arXiv:2501.05441.
    """
    half = F.softplus(logits_fake - logits_real).mean() / 2
    return half, half


def relativistic_generator_loss(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    """E[softplus(D(x) - D(G(z)))] over pairs."""
    return F.softplus(logits_real - logits_fake).mean()


@torch.no_grad()
def add_orthogonal_gradient(model: nn.Module, strength: float) -> None:
    """Adds strength * 2 (W Wᵀ ∘ (1 - I)) W to the gradient of every weight W (out, in).

    Parameters of one dimension, parameters without a gradient and the class embedding `shared`, whose rows have no
    reason to be orthogonal, are left alone. Source: Brock et al. 2019, arXiv:1809.11096, Eq. 3.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or parameter.grad is None or name == "shared.weight":
            continue
        weight = parameter.flatten(1)  # (out, in)
        gram = weight @ weight.T
        off_diagonal = gram - torch.diag_embed(gram.diagonal())
        parameter.grad.add_((off_diagonal @ weight).view_as(parameter), alpha=2 * strength)
