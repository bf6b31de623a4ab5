"""Reformer against a dense matrix of the pairs that its chunks make."""

import pytest
import torch

from attention import MultiHeadAttention, reformer_attention
from attention.reformer import SELF_PENALTY, hash_buckets
from tests.mechanisms import assert_equals_twin, make_mask, make_qkv

HEADS, HEAD_DIM, ROUNDS, CHUNK = 2, 4, 3, 3
# causal, same_bucket, count_once, lra
OPTIONS = [(False,) * 4, (True, False, True, False), (True, True, False, False), (False, True, True, False)]
OPTIONS += [(False, False, False, True)]


def twin(rotations, causal, same_bucket, count_once, lra):
    """One row and head at a time: which pairs meet in which round, then one softmax over all meetings."""

    def attend(q, k, v, mask):
        num_tokens = q.shape[2]
        rows = []
        for b in range(len(q)):
            real = torch.ones(num_tokens, dtype=torch.bool) if mask is None else ~mask[b]
            heads = []
            for h in range(q.shape[1]):
                meetings = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
                for rotation in rotations.double():
                    rotated = q[b, h].detach() @ rotation
                    bucket = torch.cat([rotated, -rotated], 1).argmax(1)
                    order = sorted(real.nonzero()[:, 0].tolist(), key=lambda i: (bucket[i].item(), i))
                    chunk = {token: place // min(CHUNK, num_tokens) for place, token in enumerate(order)}
                    for i in order:
                        for j in order:
                            near = chunk[i] - 1 <= chunk[j] <= chunk[i]
                            meetings[i, j] += near and (not same_bucket or bucket[i].item() == bucket[j].item())
                if causal:
                    meetings = meetings.tril()
                if count_once:
                    meetings = meetings.clamp_max(1)
                if lra:
                    scores = q[b, h] @ q[b, h].T * q.shape[3] ** 0.5
                else:
                    keys = q[b, h] / q[b, h].norm(dim=1, keepdim=True)
                    scores = q[b, h] @ keys.T / q.shape[3] ** 0.5 - SELF_PENALTY * torch.eye(num_tokens)
                scores = scores.masked_fill(meetings == 0, -torch.inf)
                mass = meetings * (scores - scores.detach().amax(1, keepdim=True).clamp_min(-1e9)).exp()
                heads.append(mass @ v[b, h] / mass.sum(1, keepdim=True).clamp_min(1e-300))
            rows.append(torch.stack(heads))
        return torch.stack(rows)

    return attend


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_tokens", [6, 9, 13])
def test_equals_the_matrix_of_meetings(num_tokens, options, kind):
    rotations = torch.randn(ROUNDS, HEAD_DIM, 2, generator=torch.Generator().manual_seed(3))
    q, k, v = make_qkv(3, HEADS, num_tokens, HEAD_DIM, HEAD_DIM)

    def ours(q, k, v, mask):
        return reformer_attention(q, v, rotations, CHUNK, None, mask, *options) + 0 * k  # keys are the queries

    plain = twin(rotations, *options)
    assert_equals_twin(
        ours, lambda q, k, v, mask: plain(q, k, v, mask) + 0 * k, [q, k, v], make_mask(kind, 3, num_tokens)
    )


def test_near_vectors_share_a_bucket_more_often():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2000, 16, generator=generator)
    rotations = torch.randn(8, 16, 8, generator=generator)
    base = hash_buckets(x, rotations)
    shared = []
    for noise in (0.1, 0.5, 2.0):
        moved = x + noise * torch.randn(x.shape, generator=generator)
        shared.append((hash_buckets(moved, rotations) == base).float().mean())
    assert shared[0] > shared[1] > shared[2] > 1 / 16


def test_options():
    layer = MultiHeadAttention(8, 2, "reformer", num_buckets=4)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 64  # queries and keys share a projection
    before = layer.attention.rotations.clone()
    layer.attention.redraw()
    assert not torch.equal(layer.attention.rotations, before)
    with pytest.raises(ValueError, match="num_buckets even and positive"):
        MultiHeadAttention(8, 2, "reformer", num_buckets=5)
