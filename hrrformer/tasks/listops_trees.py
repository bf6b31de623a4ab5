"""Random ListOps trees, many at a time: grown, measured, evaluated and written out level by level.

Candidate c of a seed is a function of (seed, c) alone: the random numbers of a node are a hash of the path to it, so it
does not matter who computes which candidates.

Procedure: an inner node with probability 1/4 above depth 10, else a digit; an inner node is one of four operators with
2 to 10 children. Trees whose number of tokens is out of bounds are rejected.
Source: the generator of the Long Range Arena, Tay et al. 2020, arXiv:2011.04006, after Nangia & Bowman 2018.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count as count_from

import numpy as np

from hrrformer.tasks.listops_vocabulary import END, FIRST_DIGIT, FIRST_OPERATOR, OPERATORS
from hrrformer.tasks.parallel import ordered_map
from runtime.errors import UserError
from runtime.hashing import hash64

MAX_DEPTH, MIN_CHILDREN, MAX_CHILDREN = 10, 2, 10
_STREAM = 0x1157
_CANDIDATES = 4096  # grown at once
_BARREN = 20  # so many batches without a new tree: the bounds leave no others

# Codes of the tokens of a tree: digits 0 .. 9, the end of the whole tree and of an operator in it, and operators with
# their number of children, which the text form needs.
_LAST, _CLOSE = 10, 11
_OPERATOR = 16  # 16 + 16 * operator + children
_SYMBOLS = bytes(
    FIRST_DIGIT + code if code < 10 else END if code < _OPERATOR else FIRST_OPERATOR + (code - _OPERATOR) // 16 % 4
    for code in range(256)
)
_PIECES = [f"{digit} ) " for digit in range(10)] + ["] )", "] ) ) "] + [""] * 4
_PIECES += ["( " * (code % 16 + 1) + OPERATORS[code // 16] + " " for code in range(64)]


def symbols(codes: bytes) -> bytes:
    """The token ids of a tree, one byte each."""
    return codes.translate(_SYMBOLS)


def text(codes: bytes) -> str:
    """The tree as the official files write it: `( ( ( [MAX 3 ) 4 ) ] )`."""
    return "".join([_PIECES[code] for code in codes])


def generate_trees(
    number: int, seed: int, min_length: int = 500, max_length: int = 2000, workers: int = 1
) -> Iterator[tuple[bytes, int]]:
    """The first distinct trees of a seed with more than `min_length` and fewer than `max_length` tokens.

    Args:
        number: of trees, at least 1.
        workers: processes; the trees do not depend on it.

    Yields:
        the codes of the tree (see `symbols` and `text`) and its value, 0 .. 9.

    Raises:
        UserError: there are not so many trees within the bounds, or single digits would be within them.
    """
    if min_length < 1:
        raise UserError(f"an expression has more than one token, so the least length must be above 0, not {min_length}")
    batches = ordered_map(partial(_accepted, seed, min_length, max_length), count_from(), workers, chunk=1)
    seen: set[bytes] = set()
    barren = 0
    for batch in batches:
        before = len(seen)
        for codes, value in batch:
            digest = hashlib.blake2b(codes, digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
            yield codes, value
            if len(seen) == number:
                return
        barren = barren + 1 if len(seen) == before else 0
        if barren == _BARREN:
            raise UserError(
                f"found only {before:,} different trees of more than {min_length} and fewer than {max_length} tokens"
            )


@dataclass
class _Level:
    """The nodes of one depth, candidate by candidate and left to right; children follow in the next level."""

    tree: np.ndarray  # (n,) which candidate
    inner: np.ndarray  # bool (n,)
    draw: np.ndarray  # uint64 (n,): the digit of a leaf; operator and number of children of an inner node

    def take(self, chosen: np.ndarray) -> _Level:
        return _Level(self.tree[chosen], self.inner[chosen], self.draw[chosen])

    @property
    def operator(self) -> np.ndarray:
        return (self.draw[self.inner] & np.uint64(3)).astype(np.int64)

    @property
    def children(self) -> np.ndarray:
        span = np.uint64(MAX_CHILDREN - MIN_CHILDREN + 1)
        return ((self.draw[self.inner] >> np.uint64(2)) % span).astype(np.int64) + MIN_CHILDREN


def _accepted(seed: int, min_length: int, max_length: int, batch: int) -> list[tuple[bytes, int]]:
    """The trees within the bounds among the candidates of a batch: codes and value of each."""
    levels, lengths = _grow(seed, np.arange(batch * _CANDIDATES, (batch + 1) * _CANDIDATES), max_length)
    kept = (lengths > min_length) & (lengths < max_length)
    levels = [level.take(kept[level.tree]) for level in levels]
    codes, values = _write(levels)
    ends = np.cumsum(lengths[kept])
    return [
        (codes[end - length : end].tobytes(), int(value))
        for end, length, value in zip(ends, lengths[kept], values, strict=True)
    ]


def _grow(seed: int, candidates: np.ndarray, max_length: int) -> tuple[list[_Level], np.ndarray]:
    """All levels, without the descendants of trees that are certain to become too long; tokens of each candidate."""
    tree, keys = np.arange(len(candidates)), hash64(seed, _STREAM, candidates)
    lengths = np.ones(len(candidates), dtype=np.int64)  # tokens if all nodes of the last level were leaves
    levels = []
    for depth in range(1, MAX_DEPTH + 1):
        inner = keys < np.uint64(1 << 62) if depth < MAX_DEPTH else np.zeros(len(keys), dtype=bool)
        level = _Level(tree, inner, hash64(keys, 0))
        levels.append(level)
        children = level.children
        lengths += np.bincount(tree[inner], weights=1 + children, minlength=len(lengths)).astype(np.int64)
        going_on = lengths[tree[inner]] < max_length
        children = children[going_on]
        parents = np.repeat(np.flatnonzero(inner)[going_on], children)
        place = np.arange(len(parents)) - np.repeat(np.cumsum(children) - children, children)  # among its siblings
        tree, keys = tree[parents], hash64(keys[parents], 1 + place)
    return levels, lengths


def _write(levels: list[_Level]) -> tuple[np.ndarray, np.ndarray]:
    """The codes of all trees in one row, uint8, and the value of each tree."""
    values, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]  # of the nodes of each level, deepest first
    for level in reversed(levels):
        value, size = (level.draw % np.uint64(10)).astype(np.int64), np.ones(len(level.tree), dtype=np.int64)
        if level.inner.any():
            children = level.children
            ends = np.cumsum(children)
            value[level.inner] = _evaluate(level.operator, values[-1], ends - children, ends)
            size[level.inner] = 2 + np.add.reduceat(sizes[-1], ends - children)
        values.append(value)
        sizes.append(size)
    values, sizes = values[:0:-1], sizes[:0:-1]  # by depth, as levels

    codes = np.empty(int(sizes[0].sum()), dtype=np.uint8)
    position = np.cumsum(sizes[0]) - sizes[0]  # of the first token of each node
    for depth, (level, value, size) in enumerate(zip(levels, values, sizes, strict=True)):
        inner, children = level.inner, level.children
        codes[position[~inner]] = value[~inner]
        codes[position[inner]] = _OPERATOR + 16 * level.operator + children
        codes[(position + size - 1)[inner]] = _LAST if depth == 0 else _CLOSE
        if not inner.any():
            break
        before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]  # tokens of the nodes to the left, in the whole level
        first = np.repeat(before[np.cumsum(children) - children], children)
        position = np.repeat(position[inner] + 1, children) + before - first
    return codes, values[0]


def _evaluate(operator: np.ndarray, arguments: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """MIN, MAX, MED (the mean of the two middle ones, cut to an integer) or SM (sum modulo 10) of runs of arguments."""
    run = np.repeat(np.arange(len(starts)), ends - starts)
    ordered = np.sort(run * 10 + arguments) - run * 10  # ascending within each run
    middle = (ordered[(starts + ends - 1) // 2] + ordered[(starts + ends) // 2]) // 2
    return np.choose(operator, [ordered[starts], ordered[ends - 1], middle, np.add.reduceat(arguments, starts) % 10])
