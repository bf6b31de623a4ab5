"""The losses against their equations in float64."""

import math

import pytest
import torch
from tolerance import assert_close

from hrrformer.losses import smoothed_cross_entropy, two_sided_cross_entropy

LABELS = torch.tensor([0, 2, 1, 2])


def example(num_classes=3):
    return torch.randn(4, num_classes, generator=torch.Generator().manual_seed(0)).mul_(3).requires_grad_()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_cross_entropy(smoothing):
    logits = example()
    target = (1 - smoothing) * torch.eye(3, dtype=torch.float64)[LABELS] + smoothing / 3
    expected = -(target * logits.double().log_softmax(-1)).sum(-1).mean()
    assert_close(smoothed_cross_entropy(logits, LABELS, smoothing).double(), expected, 1e-6)


def test_two_sided_cross_entropy():
    logits = example()
    p = logits.double().softmax(-1)
    y = torch.eye(3, dtype=torch.float64)[LABELS]
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).sum(-1).mean()
    loss = two_sided_cross_entropy(logits, LABELS)
    assert_close(loss.double(), expected, 1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert_close(gradient, expected_gradient, 1e-5)


def test_two_sided_cross_entropy_of_confident_mistakes():
    """At p = 1 - 1e-9, which float32 calls 1, there is still a gradient; beyond 1e-10 the loss stays finite."""
    logits = torch.tensor([[20.7, 0.0]], requires_grad=True)
    loss = two_sided_cross_entropy(logits, torch.tensor([1]))
    assert_close(loss, torch.tensor(2 * 20.7), 1e-4)
    loss.backward()
    assert_close(logits.grad, torch.tensor([[2.0, -2.0]]), 1e-4)
    far = two_sided_cross_entropy(torch.tensor([[1000.0, 0.0]]), torch.tensor([1]))
    assert_close(far, torch.tensor(-2 * math.log(1e-10)))


def test_low_precision_logits_are_widened():
    logits = example().detach().bfloat16()
    for loss in (smoothed_cross_entropy, two_sided_cross_entropy):
        value = loss(logits, LABELS)
        assert value.dtype is torch.float32
        assert_close(value, loss(logits.float(), LABELS))
