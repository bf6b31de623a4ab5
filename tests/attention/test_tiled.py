"""Tiles: the softmax and its gradients in any cut, for visible and kept pairs, with a log-sum-exp of more keys."""

import pytest
import torch

from attention.tiled import HIDDEN, LN_2, LOG2_E, Scratch, slices, tile_backward, tile_forward_, tile_shape
from tests.tolerance import assert_close


def blocks(num_queries, num_keys, head_dim, value_dim):
    torch.manual_seed(0)
    sizes = ((num_queries, head_dim), (num_keys, head_dim), (num_keys, value_dim))
    return [torch.randn(3, *size, dtype=torch.float64, requires_grad=True) for size in sizes]


def column(x, last=None):
    """(S, M, D) -> (S, M, D + 1), with -1 where nothing else is given."""
    return torch.cat([x, torch.full_like(x[..., :1], -1.0) if last is None else last], dim=-1)


@pytest.mark.parametrize("tile_queries", [2, 5, 9])
@pytest.mark.parametrize("sizes", [(9, 5, 3, 8), (9, 7, 6, 20), (9, 4, 17, 16)])
@pytest.mark.parametrize("hide, leave_out", [(False, False), (True, False), (False, True), (True, True)])
def test_equals_the_softmax(sizes, hide, leave_out, tile_queries):
    """Tiles of a few queries; the gradient also of the log-sum-exp."""
    q, k, v = blocks(*sizes)
    hidden = torch.rand(3, sizes[0], sizes[1]) < 0.3 * hide
    hidden[..., 0] = False  # and below kept: where all visible pairs are left out, the result has no meaning
    hidden[0, 1] |= hide  # a query without a visible key
    keep = (torch.rand(hidden.shape) > 0.3 * leave_out).double()
    keep[..., 0] = 1.0
    visible = ~hidden.all(dim=-1)  # (3, M)
    mass = keep * ~hidden * (0.9 * q @ k.transpose(1, 2)).exp()
    total = mass.sum(-1, keepdim=True) + ~visible[..., None]
    true_out, true_lse = mass @ v / total, total.log().squeeze(-1)
    weight, lse_weight = torch.randn_like(true_out) * visible[..., None], torch.randn_like(true_lse) * visible
    true_grads = torch.autograd.grad((true_out * weight).sum() + (true_lse * lse_weight).sum(), (q, k, v))

    q, k, v = (x.detach() for x in (0.9 * LOG2_E * q, k, v))
    scratch = Scratch(q.device, q.dtype)
    out, mass, top = torch.empty_like(true_out), *torch.empty(2, *true_out[..., :1].shape, dtype=q.dtype)
    tiles = list(slices(0, sizes[0], tile_queries))
    rules = [
        (lambda scores, m=m: scores.add_(hidden[:, m] * HIDDEN), keep[:, m])
        if hide
        else (None, keep[:, m] if leave_out else None)
        for m in tiles
    ]
    for m, (hide_, kept) in zip(tiles, rules, strict=True):
        tile_forward_(out[:, m], mass[:, m], top[:, m], q[:, m], k, v, hide_, kept, scratch)
    out, lse = out / mass, top + mass.log2()
    assert_close(lse.squeeze(-1)[visible] * LN_2, true_lse[visible])
    assert (lse.squeeze(-1)[~visible] < HIDDEN / 2).all()
    assert_close(out[visible], true_out[visible])

    delta = (weight * true_out.detach()).sum(-1, keepdim=True) - lse_weight[..., None]
    lse = lse.masked_fill(~visible[..., None], -HIDDEN)
    grad_q, grad_k, grad_v = torch.empty_like(q), None, None
    for m, (hide_, kept) in zip(tiles, rules, strict=True):
        tile = column(weight, delta)[:, m], column(q, lse)[:, m], column(k), column(v), hide_, kept, grad_k, grad_v
        grad_q[:, m], grad_k, grad_v = tile_backward(*tile, scratch)
    ours = (0.9 * grad_q, LN_2 * grad_k.transpose(1, 2), grad_v.transpose(1, 2))
    for grad, true_grad in zip(ours, true_grads, strict=True):
        assert_close(grad, true_grad)


def test_halves_of_a_softmax_merge():
    """With the output and log-sum-exp of all keys, the shares of two halves of the keys add up to the gradient."""
    q, k, v = blocks(9, 10, 3, 8)
    scores = q @ k.transpose(1, 2)
    out = torch.softmax(scores, -1) @ v
    weight = torch.randn_like(out)
    true_grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    delta, lse = (weight * out).sum(-1, keepdim=True), torch.logsumexp(scores, -1, keepdim=True) * LOG2_E
    q, k, v, delta, lse = (x.detach() for x in (q * LOG2_E, k, v, delta, lse))
    scratch = Scratch(q.device, q.dtype)
    queries = column(weight, delta), column(q, lse)
    halves = [
        [
            grad.clone()
            for grad in tile_backward(*queries, column(k)[:, n], column(v)[:, n], None, None, None, None, scratch)
        ]
        for n in (slice(0, 5), slice(5, 10))
    ]
    assert_close(halves[0][0] + halves[1][0], true_grads[0])
    assert_close(torch.cat([half[1] for half in halves], 2).transpose(1, 2) * LN_2, true_grads[1])
    assert_close(torch.cat([half[2] for half in halves], 2).transpose(1, 2), true_grads[2])


@pytest.mark.parametrize("max_score_bytes", [1, 1000, 100_000, 10**7])
@pytest.mark.parametrize("num_queries, num_keys", [(2048, 512), (5, 7), (1, 10_000)])
def test_tiles_keep_to_the_bound(num_queries, num_keys, max_score_bytes):
    scratch = Scratch(torch.device("cpu"), torch.float32)
    tile_blocks, tile_queries = tile_shape(num_queries, num_keys, scratch, max_score_bytes)
    threads = torch.get_num_threads()
    assert 1 <= tile_queries <= num_queries and tile_blocks % threads == 0
    assert 4 * tile_blocks * tile_queries * num_keys <= max(max_score_bytes, 4 * num_keys * threads)
