"""FNet against the sums of its definition."""

import math

import pytest
import torch

from attention import MultiHeadAttention
from attention.fnet import fourier_mixing, fourier_mixing_by_matmul
from tests.tolerance import assert_close


def naive(x):
    """Σ_n Σ_c x[n, c] cos(2π (n k / N + c l / C)), entry by entry."""
    batch, num_tokens, dim = x.shape
    n, c = torch.arange(num_tokens).double(), torch.arange(dim).double()
    out = torch.empty_like(x)
    for k in range(num_tokens):
        for j in range(dim):
            angle = 2 * math.pi * (n[:, None] * k / num_tokens + c * j / dim)
            out[:, k, j] = (x * angle.cos()).sum((1, 2))
    return out


@pytest.mark.parametrize("mixing", [fourier_mixing, fourier_mixing_by_matmul])
@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 8, 6), (1, 13, 5)])
def test_equals_the_sums(mixing, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = mixing(x), naive(x.detach())
    assert_close(y, expected)
    grad = torch.randn_like(x)
    assert_close(
        torch.autograd.grad(y, x, grad)[0], naive(grad)
    )  # the real part of a symmetric transform: its own adjoint


def test_both_forms_agree_on_a_long_sequence():
    torch.manual_seed(0)
    x = torch.randn(1, 3001, 8)
    assert_close(fourier_mixing_by_matmul(x), fourier_mixing(x))


def test_the_layer_has_no_parameters_and_no_mask():
    layer = MultiHeadAttention(8, 2, "fnet")
    assert not list(layer.parameters())
    with pytest.raises(ValueError, match="'fnet' takes no key_padding_mask: a Fourier transform over tokens"):
        layer(torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.bool))


def test_low_precision_transforms_in_float32():
    x = torch.ones(1, 4096, 64, dtype=torch.bfloat16)
    y = fourier_mixing(x)
    assert y.dtype == torch.bfloat16 and y[0, 0, 0] == 4096 * 64
