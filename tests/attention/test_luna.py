"""Luna against its two equations."""

import pytest
import torch

from attention import MultiHeadAttention
from tests.mechanisms import make_mask
from tests.tolerance import assert_close


def attend(query, key, value, hidden):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = (scores.exp() * ~hidden) / (scores.exp() * ~hidden).sum(-1, keepdim=True).clamp_min(1e-300)
    return weights @ value


def naive(layer, x, mask):
    """Y_P = Attn(P, X), Y_X = Attn(X, Y_P), one row and head at a time."""
    head_dim = layer.dim // layer.num_heads
    heads = [slice(h * head_dim, (h + 1) * head_dim) for h in range(layer.num_heads)]
    rows = []
    for b in range(len(x)):
        hidden = torch.zeros(x.shape[1], dtype=torch.bool) if mask is None else mask[b]
        q, k, v = layer.pack_query(layer.packed), layer.pack_key(x[b]), layer.pack_value(x[b])
        packed = torch.cat([attend(q[:, h], k[:, h], v[:, h], hidden) for h in heads], -1)
        q, k, v = layer.unpack_query(x[b]), layer.unpack_key(packed), layer.unpack_value(packed)
        none = torch.zeros(len(packed), dtype=torch.bool)
        rows.append(torch.cat([attend(q[:, h], k[:, h], v[:, h], none) for h in heads], -1))
    return layer.output(torch.stack(rows))


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("num_tokens", [2, 7])
def test_equals_its_equations(num_tokens, kind):
    torch.manual_seed(0)
    layer = MultiHeadAttention(6, 2, "luna", packed_length=3).double()
    x = torch.randn(3, num_tokens, 6, dtype=torch.float64, requires_grad=True)
    mask = make_mask(kind, 3, num_tokens)
    leaves = [x, *layer.parameters()]
    found, expected = layer(x, mask), naive(layer.attention, x, mask)
    assert_close(found, expected)
    grad = torch.randn_like(x)
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, grad) for out in (found, expected)), strict=True):
        assert_close(ours, theirs)


def test_wrong_length_raises():
    with pytest.raises(ValueError, match="packed_length must be positive"):
        MultiHeadAttention(6, 2, "luna", packed_length=0)
