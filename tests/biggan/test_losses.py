"""Losses at points where they are known, and the orthogonal gradient against autograd."""

from __future__ import annotations

import math

import torch

from biggan.generator import Generator
from biggan.losses import (
    add_orthogonal_gradient,
    hinge_discriminator_loss,
    hinge_generator_loss,
    nonsaturating_discriminator_loss,
    nonsaturating_generator_loss,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
)


def test_hinge_losses():
    real, fake = torch.tensor([[-1.0], [0.5], [3.0]]), torch.tensor([[-2.0], [1.0], [4.0]])
    loss_real, loss_fake = hinge_discriminator_loss(real, fake)
    torch.testing.assert_close(loss_real, torch.tensor((2 + 0.5 + 0) / 3))
    torch.testing.assert_close(loss_fake, torch.tensor((0 + 2 + 5) / 3))
    torch.testing.assert_close(hinge_generator_loss(fake), torch.tensor(-1.0))


def test_nonsaturating_losses_are_cross_entropies():
    real, fake = torch.randn(5, 1), torch.randn(5, 1)
    loss_real, loss_fake = nonsaturating_discriminator_loss(real, fake)
    torch.testing.assert_close(loss_real, -real.sigmoid().log().mean())
    torch.testing.assert_close(loss_fake, -(1 - fake.sigmoid()).log().mean())
    torch.testing.assert_close(nonsaturating_generator_loss(fake), -fake.sigmoid().log().mean())
    assert math.isclose(nonsaturating_generator_loss(torch.tensor([[-1e4]])).item(), 1e4)


def test_relativistic_losses_see_only_differences_of_pairs():
    real, fake = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    loss = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(3))) / 2
    for constant in (0.0, 5.0):
        halves = relativistic_discriminator_loss(real + constant, fake + constant)
        torch.testing.assert_close(torch.stack(halves), torch.full((2,), loss / 2))
        expected = (math.log1p(math.exp(0.5)) + math.log1p(math.exp(-3))) / 2
        torch.testing.assert_close(
            relativistic_generator_loss(fake + constant, real + constant), torch.tensor(expected)
        )


def test_orthogonal_gradient_is_that_of_the_penalty():
    torch.manual_seed(0)
    model = Generator(
        resolution=32, channels=8, dim_z=5, num_classes=3, shared_dim=4, attention_resolutions=(), attention="dense"
    ).double()
    for parameter in model.parameters():
        parameter.data.normal_()
        parameter.grad = torch.ones_like(parameter)
    frozen = model.blocks[0].residual.conv1.weight
    frozen.grad = None
    add_orthogonal_gradient(model, 0.3)
    assert frozen.grad is None
    for name, parameter in model.named_parameters():
        if parameter is frozen:
            continue
        weight = parameter.detach().flatten(1).requires_grad_() if parameter.ndim > 1 else None
        expected = torch.ones_like(parameter)
        if weight is not None and name != "shared.weight":
            gram = weight @ weight.T
            penalty = (gram - torch.diag(gram.diagonal())).square().sum() / 2
            expected = expected + 0.3 * torch.autograd.grad(penalty, weight)[0].view_as(parameter)
        torch.testing.assert_close(parameter.grad, expected, msg=name)


def test_orthogonal_rows_have_no_orthogonal_gradient():
    model = torch.nn.Linear(6, 4)
    torch.nn.init.orthogonal_(model.weight)
    model.weight.grad = torch.zeros_like(model.weight)
    add_orthogonal_gradient(model, 1.0)
    torch.testing.assert_close(model.weight.grad, torch.zeros(4, 6), rtol=0, atol=1e-6)
