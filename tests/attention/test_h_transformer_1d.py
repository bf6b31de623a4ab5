"""Hierarchical attention against the dense matrix of scores between averages."""

import pytest
import torch

from attention import build_attention, dense_attention, h_transformer_1d_attention
from tests.mechanisms import assert_equals_twin, make_mask, make_qkv
from tests.tolerance import assert_close


def twin(block_size, causal):
    """Σ_j w_ij v_j / Σ_j w_ij with w_ij = exp(scale * q̃_i·k̃_j), of averages over 2^l tokens each.

    l is the lowest level at which the blocks of i and j are the same or neighbours.
    """

    def attend(q, k, v, mask):
        batch, _, num_tokens, head_dim = q.shape
        real = torch.ones(batch, num_tokens, dtype=torch.bool) if mask is None else ~mask
        real = real[:, None, :, None]
        block = torch.arange(num_tokens) // block_size
        done = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
        scores = torch.zeros(*q.shape[:2], num_tokens, num_tokens, dtype=q.dtype)
        level = 0
        while not done.all():
            group = torch.arange(num_tokens) // 2**level
            same = group[:, None] == group
            members = same & real.transpose(2, 3)  # (B, 1, N, N)
            mean = members.to(q.dtype) / members.sum(-1, keepdim=True).clamp_min(1)
            first = torch.nn.functional.one_hot(group * 2**level, num_tokens).to(q.dtype)
            q_level = first @ (q * real) if causal else mean @ q
            now = ((block[:, None] >> level) - (block >> level)).abs() <= 1
            scores = torch.where(now & ~done, q_level @ (mean @ k).transpose(2, 3) * head_dim**-0.5, scores)
            done |= now
            level += 1
        visible = real.transpose(2, 3) & (torch.ones_like(done).tril() if causal else torch.ones_like(done))
        mass = torch.where(visible, scores, -torch.inf).clamp_min(-1e300).softmax(-1) * visible
        return mass @ v

    return attend


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", [2, 4])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 37])
def test_equals_the_dense_twin(num_tokens, block_size, causal, kind):
    options = {"block_size": block_size, "causal": causal}
    assert_equals_twin(
        lambda q, k, v, mask: h_transformer_1d_attention(q, k, v, key_padding_mask=mask, **options),
        twin(**options),
        make_qkv(3, 2, num_tokens, 4, 6),
        make_mask(kind, 3, num_tokens),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_two_blocks_are_dense_attention(causal):
    q, k, v = make_qkv(2, 2, 13, 4, 4)
    assert_close(h_transformer_1d_attention(q, k, v, 8, causal=causal), dense_attention(q, k, v, causal=causal))


def test_tokens_that_are_alike_within_groups_get_dense_attention():
    """With queries and keys constant over groups of four, the averages of the first two levels lose nothing."""
    q, k, v = make_qkv(1, 2, 16, 4, 4)
    q, k = (x[:, :, :4].repeat_interleave(4, dim=2) for x in (q, k))
    assert_close(h_transformer_1d_attention(q, k, v, 2), dense_attention(q, k, v))


def test_odd_blocks_raise():
    with pytest.raises(ValueError, match="even and positive, not 3"):
        build_attention("h-transformer-1d", block_size=3)
