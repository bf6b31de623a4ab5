"""SMYRF attention at sizes, masks, clusters and rules that hypothesis draws, against the dense oracle."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attention import clustered_attention
from attention.smyrf.clusters import resolve_cluster_sizes
from tests.reference import clustered_oracle
from tests.tolerance import assert_close

CASES = settings(max_examples=40, deadline=None, derandomize=True)


def check(backend, num_queries, num_keys, sizes, num_rounds, head_dims, seed, masked, **options):
    """Outputs and gradients with random orders, in float64; two rows, the second of which may be masked entirely."""
    generator = torch.Generator().manual_seed(seed)
    head_dim, value_dim = head_dims
    lengths = ((num_queries, head_dim), (num_keys, head_dim), (num_keys, value_dim))
    leaves = [torch.randn(2, 1, *size, generator=generator, dtype=torch.float64).requires_grad_() for size in lengths]
    orders = [torch.rand(num_rounds, 2, 1, n, generator=generator).argsort(-1) for n in (num_queries, num_keys)]
    if masked:
        options["key_padding_mask"] = torch.rand(2, num_keys, generator=generator) < torch.tensor([[0.4], [0.9]])
    out = clustered_attention(*leaves, *orders, *sizes, 0.8, backend=backend, **options)
    truth = clustered_oracle(*leaves, *orders, *sizes, 0.8, **options)
    assert_close(out, truth)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grads, true_grads = (torch.autograd.grad((x * weight).sum(), leaves) for x in (out, truth))
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert (grad - true_grad).abs().max() <= 1e-10 * max(true_grad.abs().max(), 1.0)  # may be nothing but zeros


@pytest.mark.parametrize("backend", ["einsum", "flash"])
@given(
    lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    num_clusters=st.integers(1, 6),
    num_rounds=st.integers(1, 4),
    head_dims=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    seed=st.integers(0, 99),
    masked=st.booleans(),
    merge=st.sampled_from(["multiset", "union"]),
)
@CASES
def test_any_sizes(backend, lengths, num_clusters, num_rounds, head_dims, seed, masked, merge):
    sizes = [-(-length // num_clusters) for length in lengths]
    try:
        resolve_cluster_sizes(*lengths, *sizes)
    except ValueError:
        assume(False)
    check(backend, *lengths, sizes, num_rounds, head_dims, seed, masked, merge=merge)


@pytest.mark.parametrize("backend", ["einsum", "flash"])
@given(
    length=st.integers(1, 150),
    cluster_size=st.integers(1, 50),
    num_rounds=st.integers(1, 3),
    head_dims=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    seed=st.integers(0, 99),
    masked=st.booleans(),
    merge=st.sampled_from(["multiset", "union"]),
    window=st.integers(0, 160),
)
@CASES
def test_any_causal_mask(backend, length, cluster_size, num_rounds, head_dims, seed, masked, merge, window):
    sizes = (cluster_size, cluster_size)
    rules = {"merge": merge, "causal_mask": True, "window": window}
    check(backend, length, length, sizes, num_rounds, head_dims, seed, masked, **rules)
