"""Permutations without tables: the position of an element is computed from a key, for ranges of any size.

A Feistel network over the bits of the size, with cycle walking for sizes that are not a power of two (as in Mitchell et
al., "Bandwidth-Optimal Random Shuffling for GPUs", 2021). All functions take arrays: a batch costs a few dozen numpy
calls and no memory.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perceiver.hashing import FIRST, GOLDEN, SECOND

U64 = NDArray[np.uint64]
ROUNDS = 8
FEWEST_BITS = np.uint64(6)
"""Halves of fewer than three bits mix unevenly."""

_GOLDEN, _FIRST, _SECOND = map(np.uint64, (GOLDEN, FIRST, SECOND))


def mix64(values: U64) -> U64:
    """Return `perceiver.hashing.mix64` of arrays."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def keys(*parts: ArrayLike) -> U64:
    """Hash integers (arrays are broadcast) to one 64-bit key each; the order of the parts matters."""
    with np.errstate(over="ignore"):
        state = np.zeros((), np.uint64)
        for part in parts:
            state = mix64(state + _GOLDEN + np.asarray(part).astype(np.uint64))
    return state


def permute(index: ArrayLike, size: ArrayLike, key: ArrayLike) -> NDArray[np.int64]:
    """Return the image of each index under a permutation of `range(size)` that the key selects.

    Args:
        index: integers, 0 <= index < size.
        size: sizes of the permuted ranges, broadcast with `index`; up to 2**62.
        key: 64-bit keys, broadcast with `index`; equal size and key mean the same permutation.

    Returns:
        int64 of the broadcast shape.
    """
    values, sizes, seeds = (np.array(a, dtype=np.uint64).ravel() for a in np.broadcast_arrays(index, size, key))
    shape = np.broadcast_shapes(np.shape(index), np.shape(size), np.shape(key))
    # The exponent of the float is the bit length; above 2**53 it may be one too large, which only costs more rounds.
    bits = np.frexp((np.maximum(sizes, 1) - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    bits = np.maximum(bits, FEWEST_BITS)
    out = _feistel(values, bits, seeds)
    wrong = np.flatnonzero(out >= sizes)
    while wrong.size:
        out[wrong] = _feistel(out[wrong], bits[wrong], seeds[wrong])
        wrong = wrong[out[wrong] >= sizes[wrong]]
    return out.astype(np.int64).reshape(shape)


def _feistel(values: U64, bits: U64, seeds: U64) -> U64:
    """Run the network once over the lowest `bits` bits: the halves take turns in scrambling each other."""
    one = np.uint64(1)
    low_bits = bits >> one
    low_mask, high_mask = (one << low_bits) - one, (one << (bits - low_bits)) - one
    low, high = values & low_mask, values >> low_bits
    with np.errstate(over="ignore"):
        for number in range(ROUNDS):
            seeds = seeds + _GOLDEN
            if number % 2:
                low = low ^ (mix64(high + seeds) & low_mask)
            else:
                high = high ^ (mix64(low + seeds) & high_mask)
    return (high << low_bits) | low
