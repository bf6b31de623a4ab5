"""Reformer: tokens sorted by a locality-sensitive hash attend to their neighbours in that order.

Kitaev et al. 2020, "Reformer: The Efficient Transformer", https://arxiv.org/abs/2001.04451, section 2. Queries and keys
are one projection, keys of unit length: k = q / |q|. The hash of a vector is argmax([xR; -xR]) for a random R. Tokens
are sorted by (hash, position) and cut into chunks of m; a token attends to its chunk and the one before (Eq. 5), to
itself only where it sees no other token. Several rounds, each with an R of its own, are merged by their log-sum-exps.

A key that is met in several rounds counts as often, as in the authors' code; `count_once=True` corrects that (appendix
A, Eq. 9). With `same_bucket=True` tokens of other hashes are hidden (Eq. 4). Masked tokens are sorted to the end, and
the first chunk has none before it, so that padding changes nothing; the authors' first chunk looks back at the last.
Reversible layers, the paper's other part, are not attention.

In the Long Range Arena's code keys keep their lengths, a token attends to itself like to others, and scores are
multiplied by sqrt(D), not divided: `lra=True`. It has one round of ten hash values and ten chunks (num_hashes=1,
num_buckets=10, chunk_size=N/10), hides no padding and has no projection of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention.blocks import attend_in_blocks_with_lse, both, join_blocks, split_blocks, with_neighbors
from attention.fnet import SELF_ATTENTION
from attention.merging import merge
from attention.registry import check_tokens, register

SELF_PENALTY = 1e5  # what attending to itself costs: all, unless there is nothing else


def reformer_attention(
    q: Tensor,
    v: Tensor,
    rotations: Tensor,
    chunk_size: int,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    causal_mask: bool = False,
    same_bucket: bool = False,
    count_once: bool = False,
    lra: bool = False,
) -> Tensor:
    """Attention of every token to the tokens near it in the order of its hash; no gradient flows through the order.

    Args:
        q: (B, H, N, D), queries, and keys once divided by their lengths.  v: (B, H, N, Dv).
        rotations: (R, D, b): R rounds of 2b hash values.
        chunk_size: m.
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, N), True = ignored.
        causal_mask: token i sees the tokens up to i. Which of them share its chunks still depends on later ones.
        same_bucket: hide tokens of other hash values.
        count_once: a key that several rounds meet counts once.
        lra: keys are the queries as they are, a token's own among them, and None means a scale of sqrt(D).

    Returns:
        (B, H, N, Dv). A token that sees no key gets zeros.
    """
    batch, heads, num_tokens, head_dim = q.shape
    scale = head_dim ** (0.5 if lra else -0.5) if scale is None else scale
    chunk_size = min(chunk_size, num_tokens)
    hidden = torch.zeros(1, num_tokens, dtype=torch.bool, device=q.device)
    hidden = hidden if key_padding_mask is None else key_padding_mask
    hidden = hidden[:, None].expand(batch, heads, -1).flatten(0, 1)  # (S, N), S = B·H
    q, v = q.flatten(0, 1), v.flatten(0, 1)  # (S, N, D)
    with torch.no_grad():
        buckets = hash_buckets(q, rotations).masked_fill(hidden, 2 * rotations.shape[2])  # (R, S, N)
        position = torch.arange(num_tokens, device=q.device)
        orders = torch.argsort(buckets * num_tokens + position, dim=-1)  # (R, S, N)
        ranks = torch.argsort(orders, dim=-1)
        chunks = ranks // chunk_size  # of every token in every round
    parts = []
    for order, rank in zip(orders, ranks, strict=True):
        facts = torch.stack([order, hidden.long().gather(1, order)], -1)  # (S, N, 2): position, padding
        facts = torch.cat([facts, *(x.gather(1, order)[..., None] for x in (*buckets, *chunks))], -1)
        round_index = len(parts)
        out, lse = _attend_in_order(
            *(x.gather(1, order[..., None].expand_as(x)) for x in (q, v)),
            facts,
            *(chunk_size, scale, causal_mask, round_index if same_bucket else None, len(rotations), count_once, lra),
        )
        out = out.gather(1, rank[..., None].expand_as(out))  # back in the tokens' own order
        parts.append((out, lse.gather(1, rank)))
    out, _ = merge(*parts)
    seen = torch.stack([lse for _, lse in parts]).amax(0) > torch.finfo(torch.float32).min / 4
    return out.masked_fill(~seen[..., None], 0.0).unflatten(0, (batch, heads))


def hash_buckets(x: Tensor, rotations: Tensor) -> Tensor:
    """argmax([xR; -xR]) for every round: x (S, N, D), rotations (R, D, b) -> int64 (R, S, N) in [0, 2b)."""
    rotated = torch.einsum("snd,rdb->rsnb", x, rotations.to(x.dtype))
    return torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)


def _attend_in_order(
    q: Tensor,
    v: Tensor,
    facts: Tensor,
    chunk_size: int,
    scale: float,
    causal: bool,
    bucket_round: int | None,
    num_rounds: int,
    count_once: bool,
    lra: bool,
) -> tuple[Tensor, Tensor]:
    """Chunks of sorted tokens attend to themselves and the chunk before.

    q (S, N, D), v (S, N, Dv), facts int64 (S, N, 2 + 2R): position, padding, and in every round hash and chunk.
    Returns out (S, N, Dv) and lse (S, N).
    """
    num_tokens = q.shape[1]
    norm = torch.linalg.vector_norm(q.to(torch.promote_types(q.dtype, torch.float32)), dim=-1, keepdim=True)
    k = q if lra else q / norm.clamp_min(1e-18).to(q.dtype)
    before = 1 if num_tokens > chunk_size else 0
    q, k, v = (split_blocks(x[:, :, None], chunk_size) for x in (q, k, v))  # (S, n, m, 1, D)
    k, v = (with_neighbors(x, before, 0) for x in (k, v))  # (S, n, L, 1, D)
    q_facts = split_blocks(facts, chunk_size, fill=-1)  # (S, n, m, 2 + 2R)
    k_facts = with_neighbors(q_facts, before, 0, fill=-1)  # (S, n, L, 2 + 2R); position -1: no token

    def pairs(fact: int) -> tuple[Tensor, Tensor]:
        return q_facts[..., fact][..., :, None], k_facts[..., fact][..., None, :]  # (S, n, m, 1), (S, n, 1, L)

    q_position, k_position = pairs(0)
    visible = both(pairs(1)[1] == 0, k_position >= 0)
    if causal:
        visible = visible & (k_position <= q_position)
    if bucket_round is not None:
        q_bucket, k_bucket = pairs(2 + bucket_round)
        visible = visible & (q_bucket == k_bucket)
    log_weights = -(0.0 if lra else SELF_PENALTY) * (q_position == k_position).to(q.dtype)  # (S, n, m, L)
    if count_once:
        meetings = 0
        for r in range(num_rounds):
            q_chunk, k_chunk = pairs(2 + num_rounds + r)
            meets = (k_chunk == q_chunk) | (k_chunk == q_chunk - 1)
            if bucket_round is not None:
                q_bucket, k_bucket = pairs(2 + r)
                meets = meets & (q_bucket == k_bucket)
            meetings = meetings + meets.to(q.dtype)
        log_weights = log_weights - meetings.clamp_min(1).log()
    out, lse = attend_in_blocks_with_lse(q, k, v, visible, scale, log_weights)
    return join_blocks(out, num_tokens)[:, :, 0], join_blocks(lse, num_tokens)[:, :, 0]


@register(
    "reformer",
    unequal_lengths=SELF_ATTENTION,
    value_dim=SELF_ATTENTION,
    causal="chunks are cut over all tokens, later ones too (causal_mask hides these, and no more)",
    kind="content",
    parameters=True,
    layer=True,
)
class ReformerAttention(nn.Module):
    """`reformer_attention` as a layer, with one projection for queries and keys, one for values, one for the output.

    Args:
        dim: channels C, a multiple of `num_heads`.
        num_hashes: R, rounds.
        num_buckets: 2b, hash values, an even number.
        chunk_size: m.
        bias: whether the projections have one.
        causal_mask, same_bucket, count_once, lra: as in `reformer_attention`.

    Raises:
        ValueError: sizes that make no sense.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_hashes: int = 4,
        num_buckets: int = 64,
        chunk_size: int = 64,
        bias: bool = False,
        causal_mask: bool = False,
        same_bucket: bool = False,
        count_once: bool = False,
        lra: bool = False,
    ) -> None:
        super().__init__()
        if num_hashes < 1 or chunk_size < 1 or num_buckets < 2 or num_buckets % 2:
            raise ValueError(
                "num_hashes and chunk_size must be positive and num_buckets even and positive, "
                f"not {num_hashes}, {chunk_size} and {num_buckets}"
            )
        self.dim, self.num_heads, self.chunk_size = dim, num_heads, chunk_size
        self.options = {"causal_mask": causal_mask, "same_bucket": same_bucket, "count_once": count_once, "lra": lra}
        self.query_key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.output = nn.Linear(dim, dim, bias=bias)
        self.register_buffer("rotations", torch.randn(num_hashes, dim // num_heads, num_buckets // 2))

    @torch.no_grad()
    def redraw(self) -> None:
        """Draws other hash functions."""
        self.rotations.normal_()

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), key_padding_mask bool (B, N), True = ignored -> (B, N, C)."""
        check_tokens(self.name, x, self.dim, key_padding_mask)
        q, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, D)
            for projection in (self.query_key, self.value)
        )
        out = reformer_attention(q, v, self.rotations, self.chunk_size, None, key_padding_mask, **self.options)
        return self.output(out.transpose(1, 2).flatten(2))
