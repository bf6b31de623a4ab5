"""Performer: the matrix of its weights, and what its random features estimate."""

import math

import pytest
import torch

from attention import build_attention, dense_attention, performer_attention
from attention.performer import orthogonal_directions
from tests.mechanisms import assert_equals_twin, make_mask, make_qkv


def twin(directions, kernel, causal, scale=0.5):
    """Weights φ(q_i)·φ(k_j) written out, without any stabilisation."""

    def feature(x):
        x = math.sqrt(scale) * x
        if kernel == "softmax":
            return (x @ directions.double().T - x.square().sum(-1, keepdim=True) / 2).exp()
        return (x if directions is None else x @ directions.double().T / math.sqrt(len(directions))).clamp_min(0) + 1e-3

    def attend(q, k, v, mask):
        weights = feature(q) @ feature(k).transpose(-1, -2)
        if causal:
            weights = weights.tril()
        if mask is not None:
            weights = weights * ~mask[:, None, None]
        return weights @ v / weights.sum(-1, keepdim=True).clamp_min(1e-300)

    return attend


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("kernel", "num_features"), [("softmax", 7), ("relu", 7), ("relu", 0)])
def test_equals_the_matrix_of_weights(kernel, num_features, causal, kind):
    torch.manual_seed(0)
    directions = orthogonal_directions(num_features, 4) if num_features else None
    assert_equals_twin(
        lambda q, k, v, mask: performer_attention(
            q, k, v, directions, kernel, scale=0.5, key_padding_mask=mask, causal=causal
        ),
        twin(directions, kernel, causal),
        make_qkv(3, 2, 13, 4, 6),
        make_mask(kind, 3, 13),
    )


def test_estimates_softmax_attention():
    """The error against dense attention falls with the square root of the features: 16 times as many, about 1/4."""
    q, k, v = make_qkv(1, 2, 64, 8, 8)
    dense = dense_attention(q, k, v, scale=0.1)
    errors = {}
    for num_features in (64, 1024):
        found = []
        for seed in range(8):
            directions = orthogonal_directions(num_features, 8, torch.Generator().manual_seed(seed))
            found.append((performer_attention(q, k, v, directions, scale=0.1) - dense).square().mean())
        errors[num_features] = torch.stack(found).mean().sqrt().item()
    assert errors[1024] < 0.4 * errors[64]
    assert errors[1024] < 0.1 * dense.square().mean().sqrt()


def test_directions_are_orthogonal_in_groups_and_as_long_as_gaussian_ones():
    directions = orthogonal_directions(3000, 6, torch.Generator().manual_seed(0)).double()
    group = directions[:6] / directions[:6].norm(dim=1, keepdim=True)
    torch.testing.assert_close(group @ group.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    covariance = directions.T @ directions / len(directions)
    torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), rtol=0, atol=0.1)


def test_orthogonal_directions_estimate_better_than_independent_ones():
    """Theorem 2 of the paper: a lower mean squared error of the kernel's estimate."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 50, 8, dtype=torch.float64, generator=generator).unbind()
    truth = (x * y / 8).sum(-1).exp()

    def error(directions):
        x_features, y_features = (
            (z / 8**0.5 @ directions.double().T - z.square().sum(-1, keepdim=True) / 16).exp() for z in (x, y)
        )
        return ((x_features * y_features).mean(-1) - truth).square().mean()

    orthogonal = torch.stack([error(orthogonal_directions(8, 8, generator)) for _ in range(300)]).mean()
    independent = torch.stack([error(torch.randn(8, 8, generator=generator)) for _ in range(300)]).mean()
    assert orthogonal < 0.9 * independent


def test_large_vectors_do_not_overflow():
    q, k, v = (20 * x.detach().float() for x in make_qkv(1, 1, 16, 8, 8))
    out = build_attention("performer", head_dim=8, num_features=32)(q, k, v)
    assert out.isfinite().all() and (out.abs() <= v.abs().max()).all()


def test_redrawing_changes_the_estimate():
    torch.manual_seed(0)
    module = build_attention("performer", head_dim=4, num_features=8)
    q, k, v = (x.detach().float() for x in make_qkv(1, 1, 16, 4, 4))
    before = module(q, k, v)
    module.redraw()
    assert not torch.allclose(module(q, k, v), before)


def test_wrong_kernels_raise():
    with pytest.raises(ValueError, match="unknown kernel 'exp'; valid ones are softmax, relu"):
        build_attention("performer", head_dim=4, kernel="exp")
    with pytest.raises(ValueError, match="softmax kernel cannot have 0 features"):
        build_attention("performer", head_dim=4, num_features=0)
