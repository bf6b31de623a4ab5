"""The equations of clustered attention written down plainly; the standard that the fast back-ends are tested against.

All rounds at once, every gathered tensor and every score in memory, as in the paper's own code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.smyrf.clusters import inverse_order


def naive_clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    q_cluster_size: int,
    k_cluster_size: int,
    scale: float,
    key_padding_mask: Tensor | None = None,
    merge: str = "multiset",
) -> Tensor:
    """out = Σ_r p_r o_r with p = softmax over rounds of lse_r.

    With merge "union", a pair that meets in m rounds has log m subtracted from its score, so that it counts once.
    Shapes as in `clustered_attention`; the cluster sizes must divide the lengths, and every query needs a key.
    """
    num_hashes = q_order.shape[0]

    def clusters(x: Tensor, order: Tensor, size: int) -> Tensor:  # (B, H, N, D) -> (R, B, H, L, size, D)
        return torch.take_along_dim(x[None], order[..., None], dim=3).unflatten(3, (-1, size))

    scores = clusters(q, q_order, q_cluster_size) @ clusters(k, k_order, k_cluster_size).transpose(-1, -2) * scale
    if key_padding_mask is not None:
        mask = key_padding_mask[None, :, None].expand(num_hashes, -1, k.shape[1], -1).gather(-1, k_order)
        scores = scores.masked_fill(mask.unflatten(-1, (-1, 1, k_cluster_size)), -torch.inf)
    if merge == "union":
        q_cluster = inverse_order(q_order) // q_cluster_size  # (R, B, H, Nq)
        k_cluster = inverse_order(k_order) // k_cluster_size
        meetings = sum(
            (
                clusters(q_round[..., None], q_order, q_cluster_size)
                == clusters(k_round[..., None], k_order, k_cluster_size).transpose(-1, -2)
            ).to(scores.dtype)
            for q_round, k_round in zip(q_cluster, k_cluster, strict=True)
        )  # (R, B, H, L, Cq, Ck)
        scores = scores - meetings.log()
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)  # (R, B, H, L, Cq, 1)
    out = (scores - lse).exp() @ clusters(v, k_order, k_cluster_size)  # (R, B, H, L, Cq, Dv)
    rank = inverse_order(q_order)[..., None]
    out, lse = (torch.take_along_dim(x.flatten(3, 4), rank, dim=3) for x in (out, lse))  # (R, B, H, Nq, Dv or 1)
    return (torch.softmax(lse, dim=0) * out).sum(dim=0)
