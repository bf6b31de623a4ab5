"""Random numbers as a hash of their place in the stream, so that any of them can be had without those before it.

Integer arithmetic only: the same bits on every machine and with every version of numpy.

Source: SplitMix64, Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def hash64(*keys: int | np.ndarray) -> np.ndarray:
    """uint64 hash of a tuple of integers, elementwise over the broadcast shape of the keys.

    For fixed other keys the hash is a bijection of each key: distinct counters never collide.
    """
    state = np.uint64(0)
    with np.errstate(over="ignore"):  # wrapping modulo 2^64 is the algorithm
        for key in keys:
            key = np.uint64(key & _MASK) if isinstance(key, int) else np.asarray(key).astype(np.uint64)
            state = (state ^ key) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from `hash64` of the same keys; exact, from the upper 53 bits."""
    return (hash64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
