"""Dropout with cheap bits: its rate, its scale, its gradient, and that its bits are independent."""

import torch

from hrrformer.dropout import dropout


def test_rate_scale_and_gradient():
    torch.manual_seed(0)
    x = (torch.rand(300, 333) + 0.5).requires_grad_()  # not a multiple of four elements
    out = dropout(x, 0.1, True)
    kept = out != 0
    assert abs(1 - kept.float().mean().item() - 0.1) < 5 * (0.09 / x.numel()) ** 0.5
    torch.testing.assert_close(out[kept], x[kept] / 0.9, rtol=2e-5, atol=0)  # the rate is rounded to 1/65536
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.9, rtol=2e-5, atol=0)


def test_neighbours_are_independent():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(1 << 18), 0.5, True) != 0).float().view(-1, 8)  # eight in a row share two words
    off_diagonal = torch.corrcoef(kept.T) - torch.eye(8)
    assert off_diagonal.abs().max() < 5 / len(kept) ** 0.5


def test_off():
    x = torch.randn(10)
    assert torch.equal(dropout(x, 0.5, False), x)
    assert torch.equal(dropout(x, 0.0, True), x)


def test_keeps_the_dtype():
    assert dropout(torch.randn(10, dtype=torch.bfloat16), 0.5, True).dtype is torch.bfloat16
