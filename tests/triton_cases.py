"""Cases for the Triton back-end of SMYRF, and the dense matrix that they are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.smyrf.triton_backend import triton_clustered_attention
from tests.reference import co_clustered
from tests.tolerance import assert_close, assert_no_worse


@dataclass(frozen=True)
class Case:
    """Sizes of one call: B, H, L clusters of Cq queries and Ck keys, R rounds, and what restricts the pairs."""

    batch_size: int = 2
    num_heads: int = 1
    num_clusters: int = 2
    q_size: int = 24
    k_size: int = 20
    head_dim: int = 5
    value_dim: int = 20
    num_rounds: int = 3
    merge: str = "multiset"
    lag: int | None = None
    masked: bool = False
    scale: float = 0.7

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Leaves q, k, v; orders of queries and keys; a key mask that hides some keys of a row and all of another."""
        torch.manual_seed(0)
        num_queries, num_keys = self.num_clusters * self.q_size, self.num_clusters * self.k_size
        sizes = ((num_queries, self.head_dim), (num_keys, self.head_dim), (num_keys, self.value_dim))
        leaves = [torch.randn(self.batch_size, self.num_heads, *size).to(dtype).requires_grad_() for size in sizes]
        shape = (self.num_rounds, self.batch_size, self.num_heads)
        orders = [torch.rand(*shape, length).argsort(-1) for length in (num_queries, num_keys)]
        mask = None
        if self.masked:
            mask = torch.rand(self.batch_size, num_keys) < 0.4
            mask[-1] = True
        return leaves, orders, mask

    def truth(self, leaves: list[Tensor], orders: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """out and lse by the matrix of multiplicities, in the leaves' precision; lse 0 where a query sees no key."""
        q, k, v = leaves
        multiplicity = co_clustered(*orders, self.q_size, self.k_size).sum(dim=0)
        if self.merge == "union":
            multiplicity = multiplicity.clamp_max(1)
        if mask is not None:
            multiplicity = multiplicity * ~mask[:, None, None]
        if self.lag is not None:
            positions = (torch.arange(x.shape[2]) for x in (q, k))
            multiplicity = multiplicity * (next(positions)[:, None] - self.lag >= next(positions))
        empty = (multiplicity == 0).all(dim=-1, keepdim=True)
        scores = (self.scale * q @ k.transpose(-1, -2) + multiplicity.to(q.dtype).log()).masked_fill(empty, 0.0)
        out = scores.softmax(-1).masked_fill(empty, 0.0) @ v
        return out, scores.logsumexp(-1).masked_fill(empty.squeeze(-1), 0.0)

    def check(self, dtype: torch.dtype, device: str) -> None:
        """Outputs, log-sum-exps and gradients of both, against the truth in float64."""
        leaves, orders, mask = self.tensors(dtype)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        truth = self.truth(exact, orders, mask)
        moved = [None if x is None else x.to(device) for x in (*leaves, *orders, mask)]
        out, lse = triton_clustered_attention(
            *moved[:5], self.num_clusters, self.scale, moved[5], merge=self.merge, lag=self.lag
        )
        out, lse = out.cpu(), lse.cpu()
        assert out.dtype == dtype and lse.dtype == torch.float32
        empty = lse == -torch.inf
        assert torch.equal(empty, truth[1] == 0)
        assert (out[empty] == 0).all()
        results = (out, lse.masked_fill(empty, 0.0))
        ours = (*results, *_gradients(results, leaves))
        truth = (*truth, *_gradients(truth, exact))
        if dtype is torch.float32:
            for value, true_value in zip(ours, truth, strict=True):
                assert_close(value, true_value)
            return
        plain = self.truth(leaves, orders, mask)
        plain = (*plain, *_gradients(plain, leaves))
        for value, plain_value, true_value in zip(ours, plain, truth, strict=True):
            assert_no_worse(value.to(dtype), plain_value, true_value)


def _gradients(results: tuple[Tensor, Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a weighted sum of both results, with weights that every precision holds exactly."""
    loss = 0
    for x in results:
        weight = (torch.arange(x.numel()) % 13 / 4 - 1).to(x.dtype).view_as(x)
        loss = loss + (x * weight).sum().double()
    return torch.autograd.grad(loss, leaves)


CASES = {
    "multiset": Case(),
    "union": Case(num_heads=2, num_rounds=2, value_dim=40, merge="union", masked=True),
    "causal union": Case(k_size=24, head_dim=20, value_dim=16, merge="union", lag=2, masked=True),
    "causal multiset": Case(k_size=24, num_rounds=2, lag=0),
    "one cluster": Case(num_clusters=1, num_rounds=1, scale=-0.5),
}
