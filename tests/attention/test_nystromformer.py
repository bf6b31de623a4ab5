"""Nyströmformer against its equation row by row, and where it must be dense attention."""

import pytest
import torch

from attention import MultiHeadAttention, build_attention, dense_attention, nystrom_attention
from attention.nystromformer import pseudo_inverse
from tests.mechanisms import assert_equals_twin, make_mask, make_qkv
from tests.tolerance import assert_close


def twin(num_landmarks):
    """Row by row: segments of the real tokens, the three softmaxes, six steps of Eq. 11."""

    def invert(a):
        z = a.T / (a.abs().sum(0).max() * a.abs().sum(1).max())
        for _ in range(6):
            z = (13 * z - z @ a @ (15 * z - z @ a @ (7 * z - z @ a @ z))) / 4
        return z

    def attend(q, k, v, mask):
        scale = q.shape[-1] ** -0.5
        rows = []
        for b in range(len(q)):
            real = torch.arange(q.shape[2]) if mask is None else (~mask[b]).nonzero()[:, 0]
            if not len(real):
                rows.append(torch.zeros_like(v[b]))
                continue
            segment = torch.arange(len(real)) * num_landmarks // max(len(real), num_landmarks)
            parts = [real[segment == s] for s in segment.unique()]
            q_marks, k_marks = (torch.stack([x[b][:, part].mean(1) for part in parts], 1) for x in (q, k))
            left = (scale * q[b] @ k_marks.transpose(-1, -2)).softmax(-1)
            core = (scale * q_marks @ k_marks.transpose(-1, -2)).softmax(-1)
            right = (scale * q_marks @ k[b][:, real].transpose(-1, -2)).softmax(-1)
            rows.append(left @ torch.stack([invert(a) for a in core]) @ right @ v[b][:, real])
        return torch.stack(rows)

    return attend


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("num_tokens", [2, 3, 13, 16])
def test_equals_its_equation(num_tokens, kind):
    assert_equals_twin(
        lambda q, k, v, mask: nystrom_attention(q, k, v, 4, key_padding_mask=mask),
        twin(4),
        make_qkv(3, 2, num_tokens, 4, 6),
        make_mask(kind, 3, num_tokens),
    )


def test_a_landmark_for_every_token_is_dense_attention():
    q, k, v = make_qkv(2, 2, 9, 4, 6)
    mask = make_mask("padding", 2, 9)
    found = nystrom_attention(q, k, v, 9, key_padding_mask=mask, inverse_steps=30)
    hidden = mask[:, None, :, None]
    expected = dense_attention(q, k, v, key_padding_mask=mask)
    assert_close(found.masked_fill(hidden, 0), expected.masked_fill(hidden, 0), 1e-8)


def test_the_iteration_converges_to_the_pseudo_inverse():
    """Six steps are enough where the softmax prefers the token itself; zero rows and columns stay zero."""
    torch.manual_seed(0)
    matrix = (torch.randn(3, 16, 16, dtype=torch.float64) + 4 * torch.eye(16)).softmax(-1)
    matrix[:, 12:] = matrix[:, :, 12:] = 0
    assert_close(pseudo_inverse(matrix, 20), torch.linalg.pinv(matrix), 1e-9)
    assert_close(pseudo_inverse(matrix), torch.linalg.pinv(matrix), 1e-2)


@pytest.mark.parametrize("kind", ["none", "padding"])
def test_the_convolution_is_added_head_by_head(kind):
    torch.manual_seed(0)
    module = build_attention("nystromformer", num_heads=2, num_landmarks=4, conv_size=3).double()
    q, k, v = make_qkv(2, 2, 9, 4, 6)
    mask = make_mask(kind, 2, 9)
    kept = v if mask is None else v.masked_fill(mask[:, None, :, None], 0)
    shifted = torch.stack([kept.roll(1, 2), kept, kept.roll(-1, 2)])  # of tokens i - 1, i, i + 1
    shifted[0, :, :, 0] = shifted[2, :, :, -1] = 0
    filters = module.conv.weight[:, 0, :, 0]  # (H, 3)
    expected = nystrom_attention(q, k, v, 4, key_padding_mask=mask) + torch.einsum("hs,sbhnd->bhnd", filters, shifted)
    assert_close(module(q, k, v, mask), expected)


def test_options():
    assert sum(p.numel() for p in MultiHeadAttention(8, 2, "nystromformer", conv_size=5).attention.parameters()) == 10
    assert not list(build_attention("nystromformer", num_heads=2, conv_size=0).parameters())
    with pytest.raises(ValueError, match="conv_size must be odd"):
        build_attention("nystromformer", num_heads=2, conv_size=4)
    with pytest.raises(ValueError, match="num_landmarks and inverse_steps must be positive"):
        build_attention("nystromformer", num_heads=2, num_landmarks=0)
