"""Locality-sensitive hash families: near vectors get near sort keys.

A family draws random projections, whose last dimension counts the hash rounds R, and gives every vector one number a
round, or one for each level of a tree and round. SMYRF uses nothing but the order of these numbers.

A projection on one direction ("e2lsh") cuts the space into slabs. Directions at right angles ("orthogonal") repeat
less of what other rounds found. A tree ("rp-tree") halves the tokens at the median of one direction, each half at the
median of the next, and so on: its clusters are narrow in several directions, and meet several times more of the
softmax than slabs of as many tokens.

A bucket ("voronoi", "cross-polytope") is no order among its tokens: they keep the one they have in the sequence (the
sort is stable), so that neighbours in an image or a text stay neighbours. Cutting sorted buckets into balanced clusters
keeps near pairs together only where queries and keys fill the buckets alike. "l2lsh" brings that about; the XBOX
transforms give the two sides different mean directions, and balance then undoes much of the hashing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def e2lsh(x: Tensor, projections: Tensor) -> Tensor:
    """<x, a> for Gaussian directions a (dim, R).

    The bucket width and the offset of the scheme would not change the order.
    Source: Datar et al. 2004, "Locality-sensitive hashing scheme based on p-stable distributions".
    """
    return x @ projections


def rp_tree(x: Tensor, projections: Tensor) -> Tensor:
    """<x, a> for directions a (dim, T, R), one for each of the T levels of a tree: (..., T, R).

    Source: Dasgupta & Freund 2008, "Random projection trees and low dimensional manifolds", STOC.
    """
    return torch.einsum("...d,dtr->...tr", x, projections)


def voronoi(x: Tensor, projections: Tensor) -> Tensor:
    """argmax_k <x, c_k> over K Gaussian centres (dim, K, R). Andoni et al. 2015, arXiv:1509.02897, "Voronoi LSH"."""
    return torch.einsum("...d,dkr->...kr", x, projections).argmax(-2).to(x.dtype)


def cross_polytope(x: Tensor, projections: Tensor) -> Tensor:
    """Nearest of the 2P vectors ±e_i after the pseudo-random rotation H S₃ H S₂ H S₁.

    `projections` (3, P, R) are the random signs on the diagonals of S, for P the next power of two from dim on.
    Source: Andoni et al. 2015, arXiv:1509.02897, section 5.
    """
    rotation_dim = projections.shape[1]
    x = F.pad(x, (0, rotation_dim - x.shape[-1])).unsqueeze(-1)  # (..., P, 1)
    hadamard = _hadamard(rotation_dim, x)
    for signs in projections:  # (P, R)
        x = hadamard @ (signs * x)  # (..., P, R)
    vertex = x.abs().argmax(-2, keepdim=True)  # (..., 1, R)
    negative = x.gather(-2, vertex) < 0
    return (2 * vertex + negative).squeeze(-2).to(x.dtype)  # opposite vertices are numbered 2i and 2i + 1


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _hadamard(size: int, like: Tensor) -> Tensor:
    """Orthonormal Hadamard matrix by Sylvester's construction."""
    matrix = like.new_ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix * size**-0.5


def random_signs(shape: tuple[int, ...], **options: object) -> Tensor:
    """-1 or +1 with equal probability."""
    return 2 * torch.randint(0, 2, shape, **options) - 1


def orthogonal(shape: tuple[int, ...], **options: object) -> Tensor:
    """Random directions (..., dim, n) of unit length at right angles, as many at a time as the space has dimensions.

    The left singular vectors of a Gaussian matrix; by the eigenvectors of its Gram matrix, which XLA can do too.
    """
    parts = torch.randn(shape, **options).split(shape[-2], dim=-1)
    squares, right = zip(*(torch.linalg.eigh(part.mT @ part) for part in parts), strict=True)
    return torch.cat([part @ v / s.sqrt().unsqueeze(-2) for part, s, v in zip(parts, squares, right, strict=True)], -1)


def orthogonal_levels(shape: tuple[int, ...], **options: object) -> Tensor:
    """`orthogonal` (..., dim, T, R), at right angles over levels and rounds."""
    *dims, levels, rounds = shape
    return orthogonal((*dims, levels * rounds), **options).unflatten(-1, (levels, rounds))


class HashFamily(NamedTuple):
    """How to draw projections and hash with them.

    `shape(dim, num_buckets, num_hashes)`: shape of the projections for vectors of size `dim`.
    `draw(shape, device=, dtype=)`: random projections; the shape may have more dimensions in front.
    `sort_keys(x (..., dim), projections)`: (..., num_hashes), or (..., levels, num_hashes) if the family is a `tree`.
    `linear`: sort keys are linear in the vectors, and the projections' first dimension is theirs.
    """

    shape: Callable[[int, int, int], tuple[int, ...]]
    draw: Callable[..., Tensor]
    sort_keys: Callable[[Tensor, Tensor], Tensor]
    linear: bool = False
    tree: bool = False


HASH_FAMILIES = {
    "e2lsh": HashFamily(lambda dim, buckets, rounds: (dim, rounds), torch.randn, e2lsh, linear=True),
    "orthogonal": HashFamily(lambda dim, buckets, rounds: (dim, rounds), orthogonal, e2lsh, linear=True),
    "rp-tree": HashFamily(
        lambda dim, buckets, rounds: (dim, tree_levels(buckets), rounds),
        orthogonal_levels,
        rp_tree,
        linear=True,
        tree=True,
    ),
    "voronoi": HashFamily(lambda dim, buckets, rounds: (dim, buckets, rounds), torch.randn, voronoi),
    "cross-polytope": HashFamily(
        lambda dim, buckets, rounds: (3, _next_power_of_two(dim), rounds), random_signs, cross_polytope
    ),
}


def tree_levels(num_clusters: int) -> int:
    """How often clusters are halved."""
    return (num_clusters - 1).bit_length()


def get_hash_family(name: str) -> HashFamily:
    """ValueError lists the valid names."""
    if name not in HASH_FAMILIES:
        raise ValueError(f"unknown hashing {name!r}; available: {', '.join(HASH_FAMILIES)}")
    return HASH_FAMILIES[name]
