"""Clustering: transforms, hash families, orders, and the statistics that make it worth doing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import SmyrfAttention, clustered_attention, dense_attention, smyrf_attention
from attention.smyrf.clusters import cluster_orders, inverse_order, resolve_cluster_sizes
from attention.smyrf.hashing import HASH_FAMILIES, tree_levels
from attention.smyrf.transforms import TRANSFORMS
from attention.smyrf.tree import tree_order
from tests.reference import co_clustered
from tests.tolerance import assert_close

CLUSTERING_PAIRS = [(name, "e2lsh") for name in sorted(TRANSFORMS)] + [
    ("l2lsh", "voronoi"),
    ("l2lsh", "cross-polytope"),
    ("xbox+", "orthogonal"),
    ("none", "orthogonal"),
    ("xbox+", "rp-tree"),
    ("none", "rp-tree"),
]


def draw(hashing, transform, head_dim, num_hashes, num_clusters=8):
    family = HASH_FAMILIES[hashing]
    shape = family.shape(head_dim + TRANSFORMS[transform].extra_dim, num_clusters, num_hashes)
    return family.draw(shape, device="cpu", dtype=torch.float32)


def transformed(name, num_queries=50, num_keys=40, head_dim=6):
    q, k = torch.randn(2, 3, num_queries, head_dim), torch.randn(2, 3, num_keys, head_dim)
    q_max, k_max = (x.norm(dim=-1, keepdim=True).amax(2, keepdim=True) for x in (q, k))
    q_parts, k_parts = TRANSFORMS[name].parts(q, k, q_max, k_max)[:2], TRANSFORMS[name].parts(q, k, q_max, k_max)[2:]
    q_new, k_new = TRANSFORMS[name].apply(q, k, q_max, k_max)
    assert torch.equal(q_new, torch.cat(q_parts, -1)) and torch.equal(k_new, torch.cat(k_parts, -1))
    assert q_parts[1].shape[-1] == k_parts[1].shape[-1] == TRANSFORMS[name].extra_dim
    return q, k, q_new, k_new


@pytest.mark.parametrize("name", ["xbox+", "xbox"])
def test_xbox_keeps_inner_products_and_levels_norms(name):
    torch.manual_seed(0)
    q, k, q_new, k_new = transformed(name)
    assert q_new.shape[-1] == k_new.shape[-1] == 6 + TRANSFORMS[name].extra_dim
    assert_close(q_new @ k_new.transpose(-1, -2), q @ k.transpose(-1, -2))
    norms = k_new.norm(dim=-1) if name == "xbox" else torch.cat([q_new.norm(dim=-1), k_new.norm(dim=-1)], -1)
    assert_close(norms, norms[..., :1].expand_as(norms))


@pytest.mark.parametrize("name", sorted(set(TRANSFORMS) - {"none"}))
def test_distance_falls_as_the_inner_product_grows(name):
    """For every query, the nearest key after the transform is the one of largest inner product."""
    torch.manual_seed(0)
    q, k, q_new, k_new = transformed(name)
    inner = q @ k.transpose(-1, -2)
    nearest = torch.cdist(q_new, k_new).argmin(-1)
    assert (nearest == inner.argmax(-1)).float().mean() >= (0.9 if name == "l2lsh" else 1.0)


def near_and_far(share, q, k):
    """Mean of `share` (B, H, Nq, Nk) over the top and the bottom tenth of inner products."""
    rank = (q @ k.transpose(-1, -2)).flatten().argsort()
    tenth = len(rank) // 10
    return share.flatten()[rank[-tenth:]].mean(), share.flatten()[rank[:tenth]].mean()


@pytest.mark.parametrize("hashing", ["voronoi", "cross-polytope"])
@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
def test_near_pairs_share_a_bucket_more_often_than_far_ones(transform, hashing):
    torch.manual_seed(0)
    q, k, q_new, k_new = transformed(transform, 256, 128, head_dim=8)
    projections = draw(hashing, transform, 8, num_hashes=64)
    q_bucket, k_bucket = (HASH_FAMILIES[hashing].sort_keys(x, projections) for x in (q_new, k_new))  # (B, H, N, R)
    near, far = near_and_far((q_bucket[:, :, :, None] == k_bucket[:, :, None]).float().mean(-1), q, k)
    assert near > 1.4 * far


@pytest.mark.parametrize("transform, hashing", CLUSTERING_PAIRS)
def test_near_pairs_share_a_cluster_more_often_than_far_ones(transform, hashing):
    torch.manual_seed(0)
    q, k = torch.randn(4, 1, 256, 8), torch.randn(4, 1, 128, 8)
    projections = draw(hashing, transform, 8, num_hashes=32)
    orders = cluster_orders(q, k, projections, 32, 16, transform=transform, hashing=hashing)
    together = co_clustered(*orders, 32, 16).float().mean(0)  # (B, H, Nq, Nk), the share of rounds
    assert together.mean() == pytest.approx(1 / 8)
    near, far = near_and_far(together, q, k)
    assert near > 1.4 * far


def test_cross_polytope_hash_has_signs_and_rotates():
    """Opposite vectors get opposite vertices; signs are -1 and +1; the rotation keeps norms."""
    torch.manual_seed(0)
    signs = draw("cross-polytope", "xbox+", 6, num_hashes=5)
    assert signs.shape == (3, 8, 5) and set(signs.unique().tolist()) == {-1.0, 1.0}
    x = torch.randn(1000, 8)
    vertex, opposite = (HASH_FAMILIES["cross-polytope"].sort_keys(y, signs).long() for y in (x, -x))
    assert torch.equal(vertex ^ 1, opposite)
    assert sorted(vertex.unique().tolist()) == list(range(16))


@pytest.mark.parametrize("hashing", ["orthogonal", "rp-tree"])
@pytest.mark.parametrize("head_dim, num_hashes", [(6, 3), (6, 6), (4, 9), (1, 2)])
def test_orthogonal_directions(hashing, head_dim, num_hashes):
    """Unit vectors, at right angles as many at a time as there are dimensions; drawn for several calls at once."""
    family = HASH_FAMILIES[hashing]
    shape = family.shape(head_dim, 8, num_hashes)
    drawn = family.draw((5, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert drawn.shape == (5, *shape)
    for directions in drawn.flatten(2).split(head_dim, dim=-1):
        assert_close(directions.mT @ directions, torch.eye(directions.shape[-1]).double().expand(5, -1, -1), 1e-6)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("num_tokens, num_clusters", [(64, 8), (64, 2), (64, 1), (24, 3), (60, 8), (7, 4)])
def test_tree_cuts_at_medians(num_tokens, num_clusters):
    """Level by level: within each part of the tree, all of the lower half lie below all of the upper half."""
    torch.manual_seed(0)
    cluster_size = -(-num_tokens // num_clusters)
    num_clusters = -(-num_tokens // cluster_size)
    levels = tree_levels(max(num_clusters, 2))
    sort_keys = torch.randn(2, 3, num_tokens, levels, 2)
    order = tree_order(sort_keys, num_clusters, cluster_size)
    assert torch.equal(order.sort(-1).values, torch.arange(num_tokens).expand(2, 2, 3, -1))
    keys = torch.take_along_dim(sort_keys.permute(3, 4, 0, 1, 2), order[None], -1)  # (T, R, B, H, N), in order
    cluster = torch.arange(num_tokens) // cluster_size
    for level in range(levels if num_clusters > 1 else 0):
        whole, half = ((cluster << depth) // num_clusters for depth in (level, level + 1))
        for part in range(1 << level):
            lower, upper = ((whole == part) & (half == 2 * part + side) for side in (0, 1))
            if lower.any() and upper.any():
                assert (keys[level][..., lower].amax(-1) <= keys[level][..., upper].amin(-1)).all()


def test_tree_of_a_padded_row_is_that_of_the_row_alone():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 6) for _ in "qkv")
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[1, 27:] = True
    for cluster_size in (8, 5, 7, 16, 40):
        module = SmyrfAttention(3, cluster_size, cluster_size, transform="none", hashing="rp-tree")
        projections = module.draw_projections(q, k)
        out = module(q, k, v, mask, projections)
        levels = module.projection_shape(27, 27, 6)[1]  # fewer tokens may need fewer levels
        alone = module(*(x[1:, :, :27] for x in (q, k, v)), projections=projections[:, :levels])
        assert_close(out[1:, :, :27], alone)


@given(
    num_queries=st.integers(1, 40),
    num_keys=st.integers(1, 40),
    num_clusters=st.integers(1, 8),
    masked=st.booleans(),
    hashing=st.sampled_from(["e2lsh", "rp-tree"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_orders_are_permutations_in_balanced_clusters(num_queries, num_keys, num_clusters, masked, hashing, seed):
    torch.manual_seed(seed)
    sizes = -(-num_queries // num_clusters), -(-num_keys // num_clusters)
    if -(-num_queries // sizes[0]) != -(-num_keys // sizes[1]):
        with pytest.raises(ValueError, match="must be equal"):
            resolve_cluster_sizes(num_queries, num_keys, *sizes)
        return
    q, k = torch.randn(2, 2, num_queries, 3), torch.randn(2, 2, num_keys, 3)
    mask = torch.rand(2, num_keys) < 0.5 if masked else None
    projections = draw(hashing, "xbox+", 3, 3, max(-(-num_queries // sizes[0]), 2))
    orders = cluster_orders(q, k, projections, *sizes, key_padding_mask=mask, hashing=hashing)
    for order, length in zip(orders, (num_queries, num_keys), strict=True):
        assert order.shape == (3, 2, 2, length)
        assert torch.equal(order.sort(-1).values, torch.arange(length).expand_as(order))
    if masked and num_queries != num_keys:
        clusters = inverse_order(orders[1]) // sizes[1]  # (R, B, H, Nk)
        for row in range(2):
            real = clusters[:, row][..., ~mask[row]]
            counts = torch.stack([(real == c).sum(-1) for c in range(-(-num_keys // sizes[1]))])
            full = counts[:-1] if num_keys % sizes[1] else counts  # the last cluster may be a short one
            assert full.numel() == 0 or full.max() - full.min() <= 1


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 99), st.integers(1, 99))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_suggested_sizes_work(num_queries, num_keys, q_size, k_size):
    try:
        resolve_cluster_sizes(num_queries, num_keys, q_size, k_size)
    except ValueError as error:
        q_size, k_size = (int(part.rstrip(",").split("=")[1]) for part in str(error).split()[-2:])
        resolve_cluster_sizes(num_queries, num_keys, q_size, k_size)


@pytest.mark.parametrize("hashing", ["e2lsh", "rp-tree"])
def test_masked_tokens_sort_last(hashing):
    torch.manual_seed(0)
    q = torch.randn(3, 2, 20, 4)
    mask = torch.rand(3, 20) < 0.5
    for order in cluster_orders(q, q, draw(hashing, "xbox+", 4, 4, 4), 5, 5, mask, hashing=hashing):
        sorted_mask = mask[:, None].expand(4, 3, 2, 20).gather(-1, order)
        assert torch.equal(sorted_mask, sorted_mask.sort(-1).values)


def test_clustering_beats_random_clusters():
    """Mean error against dense attention at 1024 x 256, 4 rounds: hashing meets more of the softmax than chance."""
    torch.manual_seed(0)
    centres = torch.randn(16, 24)
    q, k = (centres[torch.randint(16, (n,))] + 0.5 * torch.randn(n, 24) for n in (1024, 256))
    q, k, v = q[None, None], k[None, None], torch.randn(1, 1, 256, 24)
    dense = dense_attention(q, k, v, scale=0.5)
    hashed = smyrf_attention(q, k, v, torch.randn(26, 4), 256, 64, scale=0.5)
    random_orders = [torch.rand(4, 1, 1, n).argsort(-1) for n in (1024, 256)]
    by_chance = clustered_attention(q, k, v, *random_orders, 256, 64, scale=0.5)
    assert (hashed - dense).abs().mean() < 0.6 * (by_chance - dense).abs().mean()
