"""Sinkhorn attention block by block, and its balancing."""

import pytest
import torch

from attention import build_attention, dense_attention, sinkhorn_attention
from attention.sinkhorn import sinkhorn
from tests.mechanisms import assert_equals_twin, make_mask, make_qkv
from tests.tolerance import assert_close


def naive_sinkhorn(scores, iterations):
    matrix = scores.exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(0, keepdim=True)
    return matrix


def twin(module):
    """One row, head and block at a time, over the blocks that have a token."""
    m = module.block_size

    def attend(q, k, v, mask):
        batch, heads, num_tokens, head_dim = q.shape
        out = torch.zeros(batch, heads, num_tokens, v.shape[-1], dtype=q.dtype)
        num_blocks = -(-num_tokens // m)
        for b in range(batch):
            real = torch.ones(num_tokens, dtype=torch.bool) if mask is None else ~mask[b]
            real = torch.nn.functional.pad(real, (0, num_blocks * m - num_tokens)).view(num_blocks, m)
            used = [i for i in range(num_blocks) if real[i].any()]
            for h in range(heads):
                blocks = []
                for x in (q, k, v):
                    x = torch.nn.functional.pad(x[b, h], (0, 0, 0, num_blocks * m - num_tokens)).view(num_blocks, m, -1)
                    blocks.append(x * real[..., None])
                hidden = (blocks[0].sum(1) / m @ module.hidden_weight[h]).clamp_min(0)
                scores = hidden @ module.score_weight[h, :, :num_blocks] / module.temperature
                if not used:
                    continue
                sorting = naive_sinkhorn(scores[used][:, used], module.iterations)
                for row, i in enumerate(used):
                    keys, values = (
                        torch.cat([sum(w * x[j] for w, j in zip(sorting[row], used, strict=True)), x[i]])
                        for x in blocks[1:]
                    )
                    seen = torch.cat([real.any(0), real[i]])
                    tokens = slice(i * m, min((i + 1) * m, num_tokens))
                    weights = (q[b, h, tokens] @ keys.T / head_dim**0.5).exp() * seen
                    out[b, h, tokens] = weights / weights.sum(-1, keepdim=True) @ values
        return out

    return attend


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("num_tokens", [2, 8, 13])
def test_equals_the_blocks_one_by_one(num_tokens, kind):
    torch.manual_seed(0)
    module = build_attention("sinkhorn", max_length=16, num_heads=2, head_dim=4, block_size=4).double()
    assert_equals_twin(module, twin(module), make_qkv(3, 2, num_tokens, 4, 6), make_mask(kind, 3, num_tokens))


def test_balancing_ends_doubly_stochastic_and_leaves_empty_blocks_out():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    empty = torch.tensor([[False] * 5, [False, True, False, False, True]])
    matrix = sinkhorn(scores, empty, 50)
    for dim in (-1, -2):
        torch.testing.assert_close(matrix.sum(dim), (~empty).double()[:, None].expand(2, 3, 5))


def test_a_sharp_permutation_brings_its_block():
    """Scores that are a permutation matrix times 50: attention to the own and the one chosen block."""
    q, k, v = make_qkv(1, 1, 12, 4, 4)
    scores = 50 * torch.eye(3, dtype=torch.float64)[[1, 2, 0]][None, None]
    found = sinkhorn_attention(q, k, v, scores, 4)
    for i, j in enumerate([1, 2, 0]):
        keys, values = (torch.cat([x[:, :, 4 * j : 4 * j + 4], x[:, :, 4 * i : 4 * i + 4]], 2) for x in (k, v))
        assert_close(found[:, :, 4 * i : 4 * i + 4], dense_attention(q[:, :, 4 * i : 4 * i + 4], keys, values))


def summed_twin(q, k, v, mask):
    """Blocks of every n-th token one by one, as many as blocks of 4 make; then the sum of all blocks."""
    batch, heads, num_tokens, head_dim = q.shape
    n = -(-num_tokens // 4)
    real = torch.ones(batch, num_tokens, dtype=torch.bool) if mask is None else ~mask
    out = torch.zeros(batch, heads, num_tokens, v.shape[-1], dtype=q.dtype)

    def attend(q, k, v, seen):
        weights = (q @ k.T / head_dim**0.5).exp() * seen
        return weights @ v / weights.sum(-1, keepdim=True).clamp_min(1e-300)

    for b in range(batch):
        groups = [[t for t in range(s, min(s + n, num_tokens)) if real[b, t]] for s in range(0, num_tokens, n)]
        for h in range(heads):
            sums = [torch.stack([x[b, h, tokens].sum(0) for tokens in groups]) for x in (k, v)]
            seen = torch.tensor([bool(tokens) for tokens in groups])
            for i in range(n):
                own = attend(q[b, h, i::n], k[b, h, i::n], v[b, h, i::n], real[b, i::n])
                out[b, h, i::n] = own + attend(q[b, h, i::n], *sums, seen)
    return out


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("num_tokens", [2, 8, 13])
def test_lra_equals_sums_of_blocks(num_tokens, kind):
    module = build_attention("sinkhorn", max_length=16, num_heads=2, head_dim=4, block_size=4, lra=True)
    assert not list(module.parameters())
    assert_equals_twin(module, summed_twin, make_qkv(3, 2, num_tokens, 4, 6), make_mask(kind, 3, num_tokens))


def test_noise_only_while_training():
    torch.manual_seed(0)
    module = build_attention("sinkhorn", max_length=16, num_heads=2, head_dim=4, block_size=4, noise=True).double()
    q = make_qkv(1, 2, 16, 4, 4)[0]
    assert not torch.equal(module.scores(q), module.scores(q))
    module.eval()
    assert torch.equal(module.scores(q), module.scores(q))


def test_wrong_options_raise():
    with pytest.raises(ValueError, match="block_size, iterations and temperature must be positive"):
        build_attention("sinkhorn", max_length=16, num_heads=2, head_dim=4, temperature=0)
    q, k, v = make_qkv(1, 1, 12, 4, 4)
    with pytest.raises(ValueError, match=r"scores must be \(B, H, 3, 3\)"):
        sinkhorn_attention(q, k, v, torch.zeros(1, 1, 4, 4), 4)
