"""The fused operators: log-sum-exp forward, and a backward that takes a merged output."""

import pytest
import torch

from attention.fused import fused_attention, fused_attention_backward, pad_heads, supports_fused
from tests.tolerance import assert_close


def blocks(num_queries, num_keys, head_dim, value_dim, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = ((num_queries, head_dim), (num_keys, head_dim), (num_keys, value_dim))
    return [torch.randn(3, *size, dtype=dtype) for size in sizes]


def padded_backward(grad_out, q, k, v, out, lse, mask, scale):
    padded = pad_heads(q, k, v, masked=mask is not None)
    out, grad_out = (torch.nn.functional.pad(x, (0, padded[2].shape[-1] - x.shape[-1])) for x in (out, grad_out))
    grads = fused_attention_backward(grad_out, *padded, out, lse, mask, scale)
    return [grad[..., : x.shape[-1]] for grad, x in zip(grads, (q, k, v), strict=True)]


@pytest.mark.parametrize("sizes", [(9, 5, 3, 8), (4, 7, 6, 6), (5, 4, 8, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_halves_of_a_softmax_merge(sizes, masked):
    """Attention to all keys from attention to each half, both passes; one block's second half is wholly masked."""
    q, k, v = blocks(sizes[0], 2 * sizes[1], *sizes[2:])
    num_keys = sizes[1]
    mask = torch.zeros(3, 2 * num_keys, dtype=torch.bool)
    if masked:
        mask[0, num_keys:] = True
        mask[1, ::2] = num_keys > 1
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scores = (0.9 * q @ k.transpose(1, 2)).masked_fill(mask[:, None], -torch.inf)
    truth = torch.softmax(scores, -1) @ v
    weight = torch.randn_like(truth)
    true_grads = torch.autograd.grad((truth * weight).sum(), leaves)

    halves = [slice(0, num_keys), slice(num_keys, None)]
    q, k, v = (x.detach() for x in leaves)
    parts = []
    for half in halves:
        padded = pad_heads(q, k[:, half].contiguous(), v[:, half].contiguous(), masked)
        out, lse = fused_attention(*padded, mask[:, half] if masked else None, 0.9)
        parts.append((out[..., : v.shape[-1]], lse))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * (part_lse - lse).exp()[..., None] for part, part_lse in parts)
    assert_close(lse, torch.logsumexp(scores, -1))
    assert_close(out, truth)

    grads = [
        padded_backward(weight, q, k[:, half], v[:, half], out, lse, mask[:, half] if masked else None, 0.9)
        for half in halves
    ]
    assert_close(grads[0][0] + grads[1][0], true_grads[0])
    for i in (1, 2):
        assert_close(torch.cat([grads[0][i], grads[1][i]], dim=1), true_grads[i])


def test_nothing_to_attend_to():
    q, k, v = blocks(4, 3, 2, 8)
    mask = torch.ones(3, 3, dtype=torch.bool)
    out, lse = fused_attention(*pad_heads(q, k, v, masked=True), mask, 1.0)
    assert (out == 0).all() and (lse == -torch.inf).all()
    for grad in padded_backward(torch.ones(3, 4, 8, dtype=q.dtype), q, k, v, out, lse, mask, 1.0):
        assert (grad == 0).all()


def test_support():
    assert supports_fused(torch.device("cpu"), torch.float64)
    assert not supports_fused(torch.device("cuda"), torch.float64)
    assert not supports_fused(torch.device("meta"), torch.float32)
