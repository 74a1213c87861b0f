"""Texts as bytes: the ids of Perceiver IO's byte models (appendix F): six special ids, then the 256 bytes."""

import numpy as np
from numpy.typing import NDArray

PAD, BOS, EOS, MASK, CLS, SEP = range(6)
SPECIALS = 6


def byte_tokens(text: str, length: int) -> tuple[NDArray[np.int64], int]:
    """Return the ids (length,) of a text: CLS, its UTF-8 bytes + 6, SEP, padding; a longer text is cut before SEP.

    The second value is the number of ids that are not padding.
    """
    raw = np.frombuffer(text.encode("utf-8")[: length - 2], np.uint8)
    ids = np.zeros(length, np.int64)
    ids[0], ids[raw.size + 1] = CLS, SEP
    ids[1 : raw.size + 1] = raw.astype(np.int64) + SPECIALS
    return ids, raw.size + 2
