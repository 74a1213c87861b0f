"""Hashes: of integers, by the finaliser of SplitMix64 (neighbouring seeds, steps and ids give uncorrelated values), and
of JSON-able values.
"""

import hashlib
import json
from typing import Any

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The odd constants of SplitMix64: its step, and the factors of its finaliser."""

_LOWEST = (1 << 64) - 1


def mix64(value: int) -> int:
    """Return a bijective hash of the lowest 64 bits of an integer."""
    value &= _LOWEST
    value = (value ^ (value >> 30)) * FIRST & _LOWEST
    value = (value ^ (value >> 27)) * SECOND & _LOWEST
    return value ^ (value >> 31)


def short_hash(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON-able value; what is not JSON counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
