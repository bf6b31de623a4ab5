"""Locality-sensitive hash families: near vectors get near sort keys.

A family draws random projections, whose last dimension counts the hash rounds R, and gives every vector one number a
round. SMYRF uses nothing but the order of these numbers.

The number is a projection ("e2lsh") or a bucket ("voronoi", "cross-polytope"). Tokens of one bucket keep the order they
have in the sequence (the sort is stable), so that neighbours in an image or a text stay neighbours. Cutting sorted
buckets into balanced clusters keeps near pairs together only where queries and keys fill the buckets alike. "l2lsh"
brings that about; the XBOX transforms give the two sides different mean directions, and balance then undoes much of
the hashing: take them with "e2lsh".
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


class HashFamily(NamedTuple):
    """How to draw projections and hash with them.

    `shape(dim, num_buckets, num_hashes)`: shape of the projections for vectors of size `dim`.
    `draw(shape, device=, dtype=)`: random projections.  `sort_keys(x (..., dim), projections)`: (..., num_hashes).
    """

    shape: Callable[[int, int, int], tuple[int, ...]]
    draw: Callable[..., Tensor]
    sort_keys: Callable[[Tensor, Tensor], Tensor]


HASH_FAMILIES = {
    "e2lsh": HashFamily(lambda dim, buckets, rounds: (dim, rounds), torch.randn, e2lsh),
    "voronoi": HashFamily(lambda dim, buckets, rounds: (dim, buckets, rounds), torch.randn, voronoi),
    "cross-polytope": HashFamily(
        lambda dim, buckets, rounds: (3, _next_power_of_two(dim), rounds), random_signs, cross_polytope
    ),
}


def get_hash_family(name: str) -> HashFamily:
    """ValueError lists the valid names."""
    if name not in HASH_FAMILIES:
        raise ValueError(f"unknown hashing {name!r}; available: {', '.join(HASH_FAMILIES)}")
    return HASH_FAMILIES[name]
