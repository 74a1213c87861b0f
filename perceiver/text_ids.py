"""The ids of texts as UTF-8 bytes, without torch: data tasks need them, and models.

Source: Perceiver IO, appendix F; pairs of sentences as in its section 4.1.
"""

from collections.abc import Sequence

PAD, BOS, EOS, MASK, CLS, SEP = range(6)
SPECIALS = 6
"""Number of special ids; those of the 256 bytes follow."""
BETWEEN = "\x1f"
"""Between the texts of a pair: ASCII's unit separator, which becomes SEP."""


def joined(*texts: str) -> str:
    """Return several texts as one, which a model reads with SEP between them."""
    return BETWEEN.join(text.replace(BETWEEN, " ") for text in texts)


def cut_parts(text: str, length: int) -> list[bytes]:
    """Return the UTF-8 bytes of a text's parts, cut so that they have `length` ids with CLS and a SEP for each.

    The longest parts are cut, to the same size; bytes that do not divide evenly go to the first of them.
    """
    parts = [part[:length].encode() for part in text.split(BETWEEN, max(0, length - 2))]
    left = max(0, length - 1 - len(parts))
    for done, index in enumerate(sorted(range(len(parts)), key=lambda i: (len(parts[i]), -i))):
        parts[index] = parts[index][: left // (len(parts) - done)]
        left -= len(parts[index])
    return parts


def byte_ids(text: str, length: int) -> list[int]:
    """Return the ids of a text: CLS, its UTF-8 bytes + 6, SEP; a longer text is cut before SEP to `length` ids.

    Of several texts (`joined`) each ends with SEP: CLS, a, SEP, b, SEP.
    """
    ids = [CLS]
    for part in cut_parts(text, length):
        ids += [*(byte + SPECIALS for byte in part), SEP]
    return ids


def byte_text(ids: Sequence[int]) -> str:
    """Return the text of ids up to SEP; other special ids are left out, and what is not UTF-8 becomes U+FFFD."""
    whole = list(ids)
    return plain_text(whole[: whole.index(SEP)] if SEP in whole else whole)


def plain_text(ids: Sequence[int]) -> str:
    """Return the text of all ids; special ids are left out, and what is not UTF-8 becomes U+FFFD."""
    return bytes(number - SPECIALS for number in ids if number >= SPECIALS).decode("utf-8", "replace")
