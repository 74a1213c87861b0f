"""Scrambling integers, so that neighbours (seeds, steps, ids) give unrelated ones: the finaliser of SplitMix64."""

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The odd constants of SplitMix64: its step, and the factors of its finaliser."""

_LOWEST = (1 << 64) - 1


def mix64(value: int) -> int:
    """Scramble the lowest 64 bits of an integer, bijectively."""
    value &= _LOWEST
    value = (value ^ (value >> 30)) * FIRST & _LOWEST
    value = (value ^ (value >> 27)) * SECOND & _LOWEST
    return value ^ (value >> 31)
