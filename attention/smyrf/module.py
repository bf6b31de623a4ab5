"""SMYRF attention as a mechanism: draws its hash projections anew at every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention.registry import check_inputs, register
from attention.smyrf.clusters import resolve_cluster_sizes
from attention.smyrf.functional import check_options, smyrf_attention
from attention.smyrf.hashing import get_hash_family
from attention.smyrf.transforms import get_transform


@register(
    "smyrf",
    unequal_lengths=True,
    value_dim=True,
    causal="clusters are balanced over all tokens, later ones too (causal_mask hides these, and no more)",
    kind="content",
)
class SmyrfAttention(nn.Module):
    """`smyrf_attention` without parameters, in the place of any softmax attention.

    Args:
        num_hashes: hash rounds. Cost and memory of scores grow with it; so does the share of keys that a query meets.
        q_cluster_size, k_cluster_size: tokens a cluster, giving as many clusters of queries as of keys.
        scale: None means 1/sqrt(D).
        dropout: probability of dropping an attention weight while training.
        transform: "xbox+", "xbox", "h2lsh", "l2lsh" or "none".
        hashing: "e2lsh", "orthogonal", "rp-tree", "voronoi" or "cross-polytope". The paper's choice is "xbox+" with
            "e2lsh". With "none", "orthogonal" was never worse; "rp-tree" was several times better where attention is
            concentrated on few keys, and worse where it is diffuse (`tools.attention_quality` measures it).
        backend: "auto", "einsum", "flash", "native" or "triton".  merge: "multiset" or "union".
        causal_mask, window, max_score_bytes: as in `clustered_attention`.

    Attributes:
        projections: the hash directions of calls that are given none; None draws new ones at every call.

    Raises:
        ValueError: an unknown choice, no hash round, or options that exclude each other.
    """

    def __init__(
        self,
        num_hashes: int,
        q_cluster_size: int,
        k_cluster_size: int,
        scale: float | None = None,
        dropout: float = 0.0,
        transform: str = "xbox+",
        hashing: str = "e2lsh",
        backend: str = "auto",
        merge: str = "multiset",
        causal_mask: bool = False,
        window: int = 0,
        max_score_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if num_hashes < 1:
            raise ValueError(f"num_hashes must be positive, not {num_hashes}")
        check_options(backend, dropout, merge, causal_mask, window, max_score_bytes)
        get_transform(transform), get_hash_family(hashing)
        self.num_hashes = num_hashes
        self.q_cluster_size = q_cluster_size
        self.k_cluster_size = k_cluster_size
        self.scale = scale
        self.dropout = dropout
        self.transform = transform
        self.hashing = hashing
        self.backend = backend
        self.merge = merge
        self.causal_mask = causal_mask
        self.window = window
        self.max_score_bytes = max_score_bytes
        self.projections: Tensor | None = None

    def check_lengths(self, num_queries: int, num_keys: int) -> None:
        """ValueError where these lengths make unequal numbers of clusters; the message suggests sizes."""
        resolve_cluster_sizes(num_queries, num_keys, self.q_cluster_size, self.k_cluster_size)

    def projection_shape(self, num_queries: int, num_keys: int, head_dim: int) -> tuple[int, ...]:
        """The shape that `projections` must have for these lengths."""
        num_clusters = resolve_cluster_sizes(num_queries, num_keys, self.q_cluster_size, self.k_cluster_size)[2]
        dim = head_dim + get_transform(self.transform).extra_dim
        return get_hash_family(self.hashing).shape(dim, max(num_clusters, 2), self.num_hashes)

    def draw_projections(self, q: Tensor, k: Tensor) -> Tensor:
        """New projections from the default generator of q's device, shared by all rows and heads."""
        shape = self.projection_shape(q.shape[2], k.shape[2], q.shape[3])
        dtype = torch.promote_types(q.dtype, torch.float32)
        return get_hash_family(self.hashing).draw(shape, device=q.device, dtype=dtype)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        projections: Tensor | None = None,
    ) -> Tensor:
        """q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), mask bool (B, Nk), True = ignored -> (B, H, Nq, Dv)."""
        check_inputs("smyrf", q, k, v, key_padding_mask)
        if projections is None:
            projections = self.draw_projections(q, k) if self.projections is None else self.projections
        return smyrf_attention(
            q,
            k,
            v,
            projections,
            self.q_cluster_size,
            self.k_cluster_size,
            scale=self.scale,
            key_padding_mask=key_padding_mask,
            dropout=self.dropout if self.training else 0.0,
            transform=self.transform,
            hashing=self.hashing,
            backend=self.backend,
            merge=self.merge,
            causal_mask=self.causal_mask,
            window=self.window,
            max_score_bytes=self.max_score_bytes,
        )
