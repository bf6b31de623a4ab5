"""Linformer against its equation."""

import pytest
import torch

from attention import build_attention, dense_attention, linformer_attention
from tests.mechanisms import assert_equals_twin, make_mask, make_qkv
from tests.tolerance import assert_close


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("sharing", ["none", "headwise", "key-value"])
@pytest.mark.parametrize("num_tokens", [2, 13, 16])
def test_equals_its_equation(num_tokens, sharing, kind):
    torch.manual_seed(0)
    module = build_attention("linformer", max_length=16, num_heads=2, rank=3, sharing=sharing).double()

    def twin(q, k, v, mask):
        keep = torch.ones(3, num_tokens) if mask is None else (~mask).double()
        e = module.k_projection[..., :num_tokens] * keep[:, None, None]  # (B, H or 1, rank, N)
        f = module.k_projection if sharing == "key-value" else module.v_projection
        f = f[..., :num_tokens] * keep[:, None, None]
        weights = (q @ (e @ k).transpose(-1, -2) / 2).softmax(-1)
        return weights @ (f @ v)

    assert_equals_twin(module, twin, make_qkv(3, 2, num_tokens, 4, 6), make_mask(kind, 3, num_tokens))


def test_identity_projections_are_dense_attention():
    q, k, v = make_qkv(2, 2, 9, 4, 6)
    eye = torch.eye(9, dtype=torch.float64)[None]
    assert_close(linformer_attention(q, k, v, eye, eye), dense_attention(q, k, v))


def test_sharing_is_what_it_says():
    counts = {}
    for sharing in ("none", "headwise", "key-value"):
        module = build_attention("linformer", max_length=16, num_heads=2, rank=3, sharing=sharing)
        counts[sharing] = sum(p.numel() for p in module.parameters())
    assert counts == {"none": 2 * 2 * 48, "headwise": 2 * 48, "key-value": 48}


def test_wrong_options_raise():
    with pytest.raises(ValueError, match="unknown sharing 'layers'; valid ones are none, headwise, key-value"):
        build_attention("linformer", max_length=16, num_heads=2, sharing="layers")
    with pytest.raises(ValueError, match="rank must be positive"):
        build_attention("linformer", max_length=16, num_heads=2, rank=0)
    q, k, v = make_qkv(1, 1, 9, 4, 4)
    with pytest.raises(ValueError, match="8 positions, fewer than the 9 keys"):
        linformer_attention(q, k, v, torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))
