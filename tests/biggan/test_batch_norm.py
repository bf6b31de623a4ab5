"""Batch norm from primitive operations against torch's, in float64."""

import pytest
import torch
import torch.nn.functional as F

from biggan.batch_norm import primitive_batch_norm


@pytest.mark.parametrize("training", [True, False])
def test_primitive_batch_norm_is_torchs(training):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs, weights = 3 * draw(4, 3, 5, 6) + 2, draw(4, 3, 5, 6)
    statistics = [draw(3), draw(3).exp()]
    results = []
    for function in (F.batch_norm, primitive_batch_norm):
        x, (mean, var) = inputs.clone().requires_grad_(), [s.clone() for s in statistics]
        for _ in range(2):  # the second call sees what the first one stored
            out = function(x, mean, var, training=training, momentum=0.1, eps=1e-5)
        (gradient,) = torch.autograd.grad((out * weights).sum(), x)
        results.append((out.detach(), gradient, mean, var))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_primitive_batch_norm_sums_bfloat16_in_float32():
    x = (torch.randn(8, 2, 16, 16, generator=torch.Generator().manual_seed(0)) + 5).bfloat16()
    mean, var = torch.zeros(2), torch.ones(2)
    out = primitive_batch_norm(x, mean, var, training=True, momentum=1.0, eps=1e-5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(mean, x.float().mean((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(var, x.float().var((0, 2, 3)), rtol=1e-5, atol=0)
