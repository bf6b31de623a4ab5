"""Sinkhorn attention: every block of tokens attends to itself and to one block of keys that a soft permutation brings.

Tay et al. 2020, "Sparse Sinkhorn Attention", https://arxiv.org/abs/2002.11296, section 3. With blocks of m tokens, a
small network gives each block, from the sum of its tokens, a score for every block (SortNet, Eqs. 1 and 2). Rows and
columns of the scores are normalised in turn, in log space, until the matrix is nearly doubly stochastic (Sinkhorn
balancing, Eqs. 3 and 4), and mixes the blocks of keys and of values. The softmax runs over the m sorted and the m own
keys of a block together.

The paper feeds SortNet the layer's input; here each head's SortNet sees its queries. Gumbel noise on the scores is left
to `noise=True`, while training.

The Long Range Arena's code does not sort: the permutation is summed away, and every block gets the sum of all blocks.
Its blocks of 50 hold every n-th token, and it adds the outputs of two softmaxes, over the own block and over the sum:
`lra=True`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attention.blocks import OWN_POSITION, attend_in_blocks, join_blocks, split_blocks
from attention.dense import masked_attention
from attention.registry import AttentionFunction, check_inputs, register

HIDDEN = -1e30  # the log of no weight


def sinkhorn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    block_size: int,
    iterations: int = 8,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Attention inside blocks and to the blocks that `scores` sort there.

    Args:
        q, k: (B, H, N, D).  v: (B, H, N, Dv).
        scores: (B, H, n, n), n = ceil(N / block_size): how much block i wants block j, before balancing.
        block_size: m.
        iterations: of Sinkhorn balancing.
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, N), True = ignored. Blocks without a token take no part in the sorting.

    Returns:
        (B, H, N, Dv). A row without tokens gets zeros.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_inputs("sinkhorn", q, k, v, key_padding_mask)
    batch, heads, num_tokens, _ = q.shape
    if key_padding_mask is None:
        key_padding_mask = torch.zeros(1, num_tokens, dtype=torch.bool, device=q.device)
    hidden = split_blocks(key_padding_mask, block_size, fill=True)  # (B or 1, n, m)
    if scores.shape[2:] != (hidden.shape[1], hidden.shape[1]):
        raise ValueError(f"scores must be (B, H, {hidden.shape[1]}, {hidden.shape[1]}), not {tuple(scores.shape)}")
    sorting = sinkhorn(scores, hidden.all(dim=-1), iterations)  # (B, H, n, n)
    q, k, v = (split_blocks(x.transpose(1, 2), block_size) for x in (q, k, v))  # (B, n, m, H, D)
    k, v = (x.masked_fill(hidden[..., None, None], 0.0) for x in (k, v))
    sorted_k, sorted_v = (torch.einsum("bhij,bjmhd->bimhd", sorting.to(x.dtype), x) for x in (k, v))
    nowhere = hidden.all(dim=1, keepdim=True).expand_as(hidden)  # offsets at which no block has a token
    visible = ~torch.cat([nowhere, hidden], dim=2)[:, :, None]  # (B or 1, n, 1, 2m)
    k, v = torch.cat([sorted_k, k], dim=2), torch.cat([sorted_v, v], dim=2)  # (B, n, 2m, H, D)
    out = attend_in_blocks(q, k, v, visible, scale)  # (B, n, m, H, Dv)
    return join_blocks(out, num_tokens).transpose(1, 2)


def summed_blocks_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    """What the Long Range Arena's code comes to: attention inside blocks, plus attention to the sum of all blocks.

    Args, result and errors as of `sinkhorn_attention`. Block i of n holds the tokens i, i + n, i + 2n, ...
    """
    check_inputs("sinkhorn", q, k, v, key_padding_mask)
    num_tokens = q.shape[2]
    num_blocks = -(-num_tokens // block_size)
    if key_padding_mask is None:
        key_padding_mask = torch.zeros(1, num_tokens, dtype=torch.bool, device=q.device)
    k, v = (x.masked_fill(key_padding_mask[:, None, :, None], 0.0) for x in (k, v))
    q_rows, k_rows, v_rows = (split_blocks(x.transpose(1, 2), num_blocks) for x in (q, k, v))  # (B, m, n, H, D)
    hidden = split_blocks(key_padding_mask, num_blocks, fill=True)  # (B or 1, m, n)
    own = attend_in_blocks(
        *(x.transpose(1, 2) for x in (q_rows, k_rows, v_rows)), ~hidden.transpose(1, 2)[:, :, None], scale
    )  # (B, n, m, H, Dv)
    sum_k, sum_v = (x.sum(dim=2).transpose(1, 2) for x in (k_rows, v_rows))  # (B, H, m, D)
    of_sum = masked_attention(q, sum_k, sum_v, ~hidden.all(dim=2)[:, None, None], scale)
    return join_blocks(own.transpose(1, 2), num_tokens).transpose(1, 2) + of_sum


def sinkhorn(scores: Tensor, empty: Tensor, iterations: int) -> Tensor:
    """exp(scores) with rows and columns normalised in turn: (B, H, n, n), in float32 at least.

    Args:
        empty: bool (B or 1, n): blocks whose rows and columns become zero.
    """
    hidden = (empty[:, :, None] | empty[:, None])[:, None]  # (B or 1, 1, n, n)
    return _Sinkhorn.apply(scores.to(torch.promote_types(scores.dtype, torch.float32)), hidden, iterations)


class _Sinkhorn(torch.autograd.Function):
    """Keeps one matrix, not one for every iteration: each step is undone by adding what it had subtracted."""

    @staticmethod
    def forward(ctx, scores, hidden, iterations):
        log, subtracted = scores.masked_fill(hidden, HIDDEN), []
        for dim in (-1, -2) * iterations:
            subtracted.append(log.logsumexp(dim, keepdim=True))
            log = (log - subtracted[-1]).masked_fill(hidden, HIDDEN)
        ctx.save_for_backward(log, hidden, *subtracted)
        return log.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        log, hidden, *subtracted = ctx.saved_tensors
        grad = grad * log.exp()
        for dim, sums in zip((-2, -1) * (len(subtracted) // 2), reversed(subtracted), strict=True):
            grad = grad - log.exp() * grad.sum(dim, keepdim=True)  # log.exp() is normalised along dim: a softmax
            log = (log + sums).masked_fill(hidden, HIDDEN)
        return grad.masked_fill(hidden, 0.0), None, None


@register(
    "sinkhorn",
    unequal_lengths=OWN_POSITION,
    value_dim=True,
    causal="the blocks that it sorts hold later tokens; the paper's causal balancing is another function",
    any_length="its sorting network has a score for every block",
    parameters=True,
)
class SinkhornAttention(AttentionFunction):
    """`sinkhorn_attention` with a learned SortNet for each head.

    Args:
        max_length: the most tokens.
        num_heads: H.
        head_dim: D.
        block_size: m.
        iterations: of Sinkhorn balancing.
        temperature: divides the scores; a lower one makes the matrix more of a permutation.
        noise: adds Gumbel noise to the scores while training.
        lra: nothing is sorted or learned: `summed_blocks_attention`.
        scale: None means 1/sqrt(D).

    Raises:
        ValueError: sizes that make no sense.
    """

    def __init__(
        self,
        max_length: int,
        num_heads: int,
        head_dim: int,
        block_size: int = 64,
        iterations: int = 8,
        temperature: float = 0.75,
        noise: bool = False,
        scale: float | None = None,
        lra: bool = False,
    ) -> None:
        super().__init__()
        if block_size < 1 or iterations < 1 or temperature <= 0:
            raise ValueError("block_size, iterations and temperature must be positive")
        self.max_length, self.block_size, self.iterations = max_length, block_size, iterations
        self.temperature, self.noise, self.scale, self.lra = temperature, noise, scale, lra
        if lra:
            return
        max_blocks = -(-max_length // block_size)
        self.hidden_weight = nn.Parameter(torch.randn(num_heads, head_dim, head_dim) * head_dim**-0.5)
        self.score_weight = nn.Parameter(torch.randn(num_heads, head_dim, max_blocks) * head_dim**-0.5)

    def scores(self, q: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """SortNet: q (B, H, N, D) -> (B, H, n, n), from the sums of each block's queries, divided by the block size."""
        if key_padding_mask is not None:
            q = q.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        sums = split_blocks(q.transpose(1, 2), self.block_size).mean(dim=2).transpose(1, 2)  # (B, H, n, D)
        hidden = F.relu(sums @ self.hidden_weight.to(q.dtype))
        scores = hidden @ self.score_weight[..., : sums.shape[2]].to(q.dtype)  # (B, H, n, n)
        if self.noise and self.training:
            uniform = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
            scores = scores - (-uniform.log()).log()
        return scores / self.temperature

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q, k (B, H, N, D), v (B, H, N, Dv), key_padding_mask bool (B, N), True = ignored -> (B, H, N, Dv)."""
        self.check_inputs(q, k, v, key_padding_mask)
        if self.lra:
            return summed_blocks_attention(q, k, v, self.block_size, self.scale, key_padding_mask)
        scores = self.scores(q, key_padding_mask)
        return sinkhorn_attention(q, k, v, scores, self.block_size, self.iterations, self.scale, key_padding_mask)
