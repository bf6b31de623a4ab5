"""Mechanisms against the public packages on PyPI, with the same weights; skipped where a package is absent.

Longformer and BigBird are compared with transformers in their own files.
"""

import math
from functools import partial

import pytest
import torch

from attention import MultiHeadAttention, performer_attention, reformer_attention
from attention.performer import orthogonal_directions
from tests.mechanisms import assert_equals_twin, make_qkv
from tests.tolerance import assert_close


def gradients_agree(ours, theirs, leaves):
    """Outputs and gradients of two functions of the same leaves, float64."""
    outs = ours(*leaves), theirs(*leaves)
    assert_close(*outs)
    grad = torch.randn(outs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for found, expected in zip(*(torch.autograd.grad(out, leaves, grad) for out in outs), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_performer_pytorch(kernel, causal):
    """Its kernels add to every feature what ours does not: 1e-4 in softmax's (here 0), no 1/sqrt(M) in relu's."""
    peer = pytest.importorskip("performer_pytorch.performer_pytorch")
    directions = orthogonal_directions(16, 6, torch.Generator().manual_seed(0)).double()
    if kernel == "softmax":
        features = partial(peer.softmax_kernel, projection_matrix=directions, eps=0.0)
    else:
        relu = lambda x: torch.relu(x) / math.sqrt(16)  # noqa: E731
        features = lambda x, is_query: peer.generalized_kernel(x, projection_matrix=directions, kernel_fn=relu)  # noqa: E731
    attend = partial(peer.causal_linear_attention_noncuda, eps=0.0) if causal else peer.linear_attention

    def theirs(q, k, v, mask):
        return attend(features(q, is_query=True), features(k, is_query=False), v)

    def ours(q, k, v, mask):
        return performer_attention(q, k, v, directions, kernel, causal=causal)

    assert_equals_twin(ours, theirs, make_qkv(2, 3, 128, 6, 6), None)


@pytest.mark.parametrize("num_tokens", [20, 13])
def test_linformer(num_tokens):
    peer = pytest.importorskip("linformer.linformer")
    torch.manual_seed(0)
    theirs = peer.LinformerSelfAttention(dim=12, seq_len=20, k=4, heads=3).double()
    ours = MultiHeadAttention(12, 3, "linformer", bias=False, max_length=20, rank=4).double()
    with torch.no_grad():
        theirs.to_out.bias.zero_()  # ours has none
        for own, other in zip((ours.query, ours.key, ours.value, ours.output), _projections(theirs), strict=True):
            own.weight.copy_(other)
        ours.attention.k_projection.copy_(theirs.proj_k.T)
        ours.attention.v_projection.copy_(theirs.proj_v.T)
    x = torch.randn(2, num_tokens, 12, dtype=torch.float64, requires_grad=True)
    gradients_agree(ours, theirs, [x])


def _projections(layer):
    return layer.to_q.weight, layer.to_k.weight, layer.to_v.weight, layer.to_out.weight


@pytest.mark.parametrize(("batch", "heads", "steps"), [(1, 1, 6), (2, 3, 24)])
def test_nystrom_attention(batch, heads, steps):
    """Its inverse starts from the largest norm of batch and heads: it equals ours for one head, or once converged."""
    peer = pytest.importorskip("nystrom_attention")
    torch.manual_seed(0)
    sizes = {"num_landmarks": 4, "pinv_iterations": steps, "residual_conv_kernel": 5}
    theirs = peer.NystromAttention(4 * heads, dim_head=4, heads=heads, **sizes).double()
    options = {"num_landmarks": 4, "inverse_steps": steps, "conv_size": 5}
    ours = MultiHeadAttention(4 * heads, heads, "nystromformer", **options).double()
    with torch.no_grad():
        theirs.to_out[0].bias.zero_()  # ours has none
        for own, other in zip((ours.query, ours.key, ours.value), theirs.to_qkv.weight.chunk(3), strict=True):
            own.weight.copy_(other)
        ours.output.weight.copy_(theirs.to_out[0].weight)
        ours.attention.conv.weight.copy_(theirs.res_conv.weight)
    x = 3 * torch.randn(batch, 16, 4 * heads, dtype=torch.float64)  # landmarks that differ: an inverse worth the name
    gradients_agree(ours, theirs, [x.requires_grad_()])


@pytest.mark.parametrize("causal", [False, True])
def test_reformer_pytorch(causal):
    """Within buckets: its first chunk looks back at the last one of the round before, which only other buckets hide."""
    peer = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    options = {"bucket_size": 4, "n_hashes": 3, "attend_across_buckets": False, "causal": causal}
    theirs = peer.LSHAttention(**options).double()
    q, _, v = make_qkv(2, 3, 32, 6, 6)
    torch.manual_seed(5)
    rotations = torch.randn(1, 6, 3, 4, dtype=torch.float64)  # as it will draw them: 8 buckets of 32 / 4 tokens

    def peer_attention(q, v):
        torch.manual_seed(5)
        return theirs(q.flatten(0, 1), v.flatten(0, 1))[0].unflatten(0, (2, 3))

    def ours(q, v):
        return reformer_attention(q, v, rotations[0].transpose(0, 1), 4, causal_mask=causal, same_bucket=True)

    gradients_agree(ours, peer_attention, [q, v])
    seen_alone = reformer_attention(q, v, rotations[0].transpose(0, 1)[:1], 4, causal_mask=causal, same_bucket=True)
    assert (seen_alone - ours(q, v)).abs().max() > 1e-3  # the rounds differ
