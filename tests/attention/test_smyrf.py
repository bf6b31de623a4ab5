"""SMYRF attention: every back-end against the naive twin and a dense oracle, at odd sizes and with masks."""

import pytest
import torch

from attention import SmyrfAttention, clustered_attention, dense_attention, smyrf_attention
from attention.smyrf.hashing import HASH_FAMILIES
from attention.smyrf.naive import naive_clustered_attention
from attention.smyrf.transforms import TRANSFORMS
from tests.native import native
from tests.reference import clustered_oracle
from tests.tolerance import assert_close, assert_no_worse

WITH_FLOAT64 = ["einsum", "flash"]
BACKENDS = [*WITH_FLOAT64, native]
MERGES = ["multiset", "union"]
# (B, H, Nq, Nk, D, Dv), (q_cluster_size, k_cluster_size), whether sizes divide lengths
DIVIDED = [
    ((2, 3, 32, 32, 6, 6), (8, 8)),
    ((2, 1, 64, 16, 4, 12), (16, 4)),
    ((1, 2, 24, 48, 8, 3), (8, 16)),
    ((1, 1, 16, 4, 1, 4), (4, 1)),
]
RAGGED = [
    ((2, 2, 37, 37, 5, 7), (8, 8)),
    ((1, 2, 63, 17, 4, 4), (16, 5)),
    ((2, 1, 5, 5, 3, 8), (8, 8)),
    ((1, 1, 7, 3, 2, 6), (3, 1)),
]


def inputs(shape, dtype=torch.float32, num_hashes=3, seed=0):
    batch, heads, num_queries, num_keys, head_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((num_queries, head_dim), (num_keys, head_dim), (num_keys, value_dim))
    leaves = [
        torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in sizes
    ]
    projections = torch.randn(head_dim + 2, num_hashes, generator=generator, dtype=torch.float64)
    return leaves, projections.to(torch.promote_types(dtype, torch.float32))


def random_mask(batch, length, seed=1):
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[:, 0] = False
    return mask


def gradients(out, leaves):
    weight = torch.linspace(-1.0, 2.0, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)
    return torch.autograd.grad((out * weight).sum(), leaves)


def assert_same(out, truth, leaves):
    assert_close(out, truth)
    for ours, theirs in zip(gradients(out, leaves), gradients(truth, leaves), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("backend", WITH_FLOAT64)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape, sizes", DIVIDED)
def test_equals_the_naive_twin(shape, sizes, dtype, merge, backend):
    leaves, projections = inputs(shape, dtype)
    options = {"scale": 0.8, "backend": backend, "merge": merge}
    out, orders = smyrf_attention(*leaves, projections, *sizes, **options, return_clusters=True)
    assert_same(out, naive_clustered_attention(*leaves, *orders, *sizes, 0.8, merge=merge), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape, sizes", DIVIDED + RAGGED)
def test_equals_the_dense_matrix(shape, sizes, masked, merge, backend):
    """Any length, any mask; a key met in two rounds counts twice or once."""
    leaves, projections = inputs(shape)
    mask = random_mask(shape[0], shape[3]) if masked else None
    options = {"scale": 0.8, "key_padding_mask": mask, "merge": merge}
    out, orders = smyrf_attention(*leaves, projections, *sizes, **options, backend=backend, return_clusters=True)
    assert_same(out, clustered_oracle(*leaves, *orders, *sizes, **options), leaves)


@pytest.mark.parametrize("backend", WITH_FLOAT64)
@pytest.mark.parametrize("merge", MERGES)
def test_huge_scores(merge, backend):
    """In a union, what is left of a round may lie thousands below a score that counted in an earlier round."""
    leaves, projections = inputs((1, 2, 24, 24, 4, 4), torch.float64)
    options = {"scale": 1000.0, "merge": merge}
    out, orders = smyrf_attention(*leaves, projections, 8, 8, **options, backend=backend, return_clusters=True)
    assert_same(out, clustered_oracle(*leaves, *orders, 8, 8, **options), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length, size", [(37, 8), (150, 75), (5, 8), (3, 1)])
def test_causal_mask(length, size, masked, window, merge, backend):
    leaves, projections = inputs((2, 2, length, length, 5, 7))
    mask = random_mask(2, length) if masked else None
    options = {"scale": 0.8, "key_padding_mask": mask, "merge": merge, "causal_mask": True, "window": window}
    out, orders = smyrf_attention(*leaves, projections, size, size, **options, backend=backend, return_clusters=True)
    assert_same(out, clustered_oracle(*leaves, *orders, size, size, **options), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_causal_cluster_is_causal_attention(backend):
    """In a union; a multiset counts the band twice."""
    leaves, projections = inputs((2, 2, 70, 70, 4, 6))
    options = {"merge": "union", "causal_mask": True, "window": 9, "backend": backend}
    out = smyrf_attention(*leaves, projections, 70, 70, **options)
    assert_same(out, torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("causal_mask", [False, True])
def test_bounded_scores_change_nothing(causal_mask, merge, backend):
    leaves, projections = inputs((2, 1, 64, 64, 4, 6))
    options = {"merge": merge, "causal_mask": causal_mask, "window": 3 * causal_mask, "backend": backend}
    for max_score_bytes in (1, 4 * 16 * 16, 4 * 16 * 40):
        bounded = smyrf_attention(*leaves, projections, 16, 16, **options, max_score_bytes=max_score_bytes)
        assert_same(bounded, smyrf_attention(*leaves, projections, 16, 16, **options), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 2, 19, 19, 4, 4), (1, 1, 30, 7, 3, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_one_cluster_is_dense_attention(shape, masked, backend):
    """Sizes above the lengths count as the lengths, and the same softmax in every round merges to itself."""
    leaves, projections = inputs(shape)
    mask = random_mask(shape[0], shape[3]) if masked else None
    out = smyrf_attention(*leaves, projections, 64, 64, key_padding_mask=mask, backend=backend)
    assert_same(out, dense_attention(*leaves, key_padding_mask=mask), leaves)


@pytest.mark.parametrize("backend", WITH_FLOAT64)
@pytest.mark.parametrize("merge", MERGES)
def test_gradcheck(merge, backend):
    leaves, projections = inputs((2, 1, 7, 5, 2, 3), torch.float64, num_hashes=2)
    mask = torch.tensor([[False, True, False, False, True], [True] * 5])
    orders = smyrf_attention(*leaves, projections, 3, 2, key_padding_mask=mask, return_clusters=True)[1]

    def attend(q, k, v):
        return clustered_attention(q, k, v, *orders, 3, 2, key_padding_mask=mask, backend=backend, merge=merge)

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("options", [{}, {"merge": "union"}, {"causal_mask": True, "window": 1}], ids=str)
def test_einsum_has_second_derivatives(options):
    leaves, projections = inputs((1, 1, 5, 5, 2, 2), torch.float64, num_hashes=2)
    orders = smyrf_attention(*leaves, projections, 2, 2, return_clusters=True)[1]
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: clustered_attention(q, k, v, *orders, 2, 2, backend="einsum", **options), leaves
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, sizes", DIVIDED[:2])
def test_low_precision_is_no_worse_than_plain(shape, sizes, dtype, backend):
    """Against the naive twin in the same precision, outputs and gradients, with the truth in float64."""
    leaves, projections = inputs(shape, dtype)
    out, orders = smyrf_attention(*leaves, projections, *sizes, scale=1.0, backend=backend, return_clusters=True)
    plain = naive_clustered_attention(*leaves, *orders, *sizes, 1.0)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = naive_clustered_attention(*exact, *orders, *sizes, 1.0)
    assert_no_worse(out, plain, truth)
    for triple in zip(gradients(out, leaves), gradients(plain, leaves), gradients(truth, exact), strict=True):
        assert_no_worse(*triple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(4, 4), (6, 6), (16, 16)])
def test_padding_a_row_changes_nothing(sizes, backend):
    """Self-attention: the real tokens of a padded row get exactly the clusters and outputs of the row alone."""
    (q, k, v), projections = inputs((2, 2, 16, 16, 4, 4))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[1, 11:] = True
    q, k, v = (torch.where(mask[:, None, :, None], 50.0, x) for x in (q, k, v))  # padding must not set the norms
    out = smyrf_attention(q, k, v, projections, *sizes, key_padding_mask=mask, backend=backend)
    alone = smyrf_attention(*(x[1:, :, :11] for x in (q, k, v)), projections, *sizes, backend=backend)
    assert_close(out[1:, :, :11], alone)


def test_every_query_meets_a_key_in_cross_attention():
    """Most keys of the second row are masked; its few real ones are shared among all clusters."""
    (q, k, v), projections = inputs((2, 1, 64, 32, 4, 4), num_hashes=1)
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[1, 4:] = True
    out, (_, k_order) = smyrf_attention(q, k, v, projections, 16, 8, key_padding_mask=mask, return_clusters=True)
    real_per_cluster = (~mask[1][k_order[0, 1, 0]]).view(4, 8).sum(1)
    assert real_per_cluster.tolist() == [1, 1, 1, 1]
    assert (out.abs().sum(-1) > 0).all()


def test_query_mask_of_equal_lengths_means_cross_attention():
    (q, k, v), projections = inputs((1, 1, 16, 16, 4, 4), num_hashes=1)
    key_mask = torch.arange(16)[None] >= 4
    no_query_masked = torch.zeros(1, 16, dtype=torch.bool)
    out = smyrf_attention(q, k, v, projections, 4, 4, None, key_mask, no_query_masked)
    assert (out.abs().sum(-1) > 0).all()
    self_attention = smyrf_attention(q, k, v, projections, 4, 4, None, key_mask)
    assert (self_attention[0, 0, 4:] == 0).all()


def test_dropout():
    """Off: a function of its arguments. On: the expectation stays, and the back-end is einsum."""
    leaves, projections = inputs((1, 1, 16, 16, 4, 4))
    module = SmyrfAttention(3, 8, 8, dropout=0.3)
    exact = smyrf_attention(*leaves, projections, 8, 8)
    assert torch.equal(module.eval()(*leaves, projections=projections), exact)
    torch.manual_seed(0)
    many = module.train()(*(x.expand(4000, -1, -1, -1) for x in leaves), projections=projections)
    assert_close(many.mean(0, keepdim=True), exact, 0.05)
    assert not torch.equal(many[0], many[1])


def test_projections_come_from_the_default_generator():
    leaves, _ = inputs((1, 1, 32, 32, 4, 4))
    module = SmyrfAttention(2, 8, 8)
    torch.manual_seed(3)
    first, second = module(*leaves), module(*leaves)
    torch.manual_seed(3)
    assert torch.equal(module(*leaves), first) and not torch.equal(first, second)


def test_projections_stay_float32_for_low_precision_and_autocast():
    leaves, projections = inputs((1, 1, 64, 64, 8, 8), torch.bfloat16)
    assert SmyrfAttention(2, 8, 8).draw_projections(*leaves[:2]).dtype == torch.float32
    orders = smyrf_attention(*leaves, projections, 8, 8, return_clusters=True)[1]
    exact = smyrf_attention(*(x.double() for x in leaves), projections.double(), 8, 8, return_clusters=True)[1]
    with torch.autocast("cpu", torch.bfloat16):
        out, cast = smyrf_attention(*leaves, projections, 8, 8, return_clusters=True)
    for a, b, c in zip(orders, exact, cast, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("hashing", HASH_FAMILIES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform_with_every_family(transform, hashing):
    leaves, _ = inputs((2, 2, 24, 12, 5, 7))
    module = SmyrfAttention(2, 8, 4, transform=transform, hashing=hashing)
    assert module(*leaves).shape == (2, 2, 24, 7)


def test_unequal_cluster_counts_name_both_and_suggest():
    (q, k, v), projections = inputs((1, 1, 64, 16, 4, 4))
    with pytest.raises(ValueError, match="4 clusters.*make 2.*q_cluster_size=16, k_cluster_size=4"):
        smyrf_attention(q, k, v, projections, 16, 8)
    with pytest.raises(ValueError, match="4 clusters.*make 2"):
        SmyrfAttention(2, 16, 8).check_lengths(64, 16)
    SmyrfAttention(2, 16, 4).check_lengths(64, 16)


def test_mistakes_list_the_valid_choices():
    (q, k, v), projections = inputs((1, 1, 16, 16, 4, 4))
    with pytest.raises(ValueError, match="backend 'fused'.*auto, einsum, flash, native, triton"):
        smyrf_attention(q, k, v, projections, 8, 8, backend="fused")
    with pytest.raises(ValueError, match="merge 'sum'.*multiset, union"):
        SmyrfAttention(2, 8, 8, merge="sum")
    with pytest.raises(ValueError, match="causal mask needs as many keys as queries, not 8 for 16"):
        smyrf_attention(q, k[:, :, :8], v[:, :, :8], projections, 8, 4, causal_mask=True)
    with pytest.raises(ValueError, match="window counts"):
        SmyrfAttention(2, 8, 8, window=3)
    with pytest.raises(ValueError, match="max_score_bytes must be positive"):
        SmyrfAttention(2, 8, 8, max_score_bytes=0)
    with pytest.raises(ValueError, match="xbox\\+, xbox, h2lsh, l2lsh, none"):
        SmyrfAttention(2, 8, 8, transform="xbox-")
    with pytest.raises(ValueError, match="e2lsh, orthogonal, rp-tree, voronoi, cross-polytope"):
        SmyrfAttention(2, 8, 8, hashing="lsh")
    with pytest.raises(ValueError, match="no dropout"):
        SmyrfAttention(2, 8, 8, dropout=0.1, backend="flash")
    with pytest.raises(ValueError, match="no dropout"):
        smyrf_attention(q, k, v, projections, 8, 8, dropout=0.1, backend="flash")
    with pytest.raises(ValueError, match="num_hashes"):
        SmyrfAttention(0, 8, 8)
    with pytest.raises(ValueError, match="positive"):
        smyrf_attention(q, k, v, projections, 0, 8)
    with pytest.raises(ValueError, match=r"projections \(6, 3\).*\(4, 3\)"):
        smyrf_attention(q, k, v, projections[:4], 8, 8)


@pytest.mark.cuda
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape, sizes", DIVIDED + RAGGED)
def test_flash_on_cuda(shape, sizes, dtype, masked):
    leaves, projections = inputs(shape, dtype)
    mask = random_mask(shape[0], shape[3]) if masked else None
    options = {"scale": 0.8, "key_padding_mask": mask}
    plain, orders = smyrf_attention(*leaves, projections, *sizes, **options, backend="einsum", return_clusters=True)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = clustered_oracle(*exact, *orders, *sizes, 0.8, mask)
    device = [x.detach().cuda().requires_grad_() for x in leaves]
    on_device = [None if x is None else x.cuda() for x in (*orders, mask)]
    out = clustered_attention(*device, *on_device[:2], *sizes, 0.8, on_device[2], backend="flash")
    assert_no_worse(out.cpu(), plain, truth)
    for a, b, c in zip(gradients(out.cpu(), device), gradients(plain, leaves), gradients(truth, exact), strict=True):
        assert_no_worse(a.cpu(), b, c)
