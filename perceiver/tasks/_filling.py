"""Fill `[MASK]` in texts with a masked language model of bytes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from perceiver.tasks._base import network
from perceiver.text_ids import CLS, SEP, SPECIALS

MASK = "[MASK]"
LONGEST, GUESS = 12, 5
"""Most bytes of a word whose length is not given, and how many stand for one that is filled later."""
MOST_MASKS = 32
"""Most masks of a text, several next to each other counted once; each takes up to `LONGEST` forward passes."""
PAD = 0
_RUNS = re.compile(rf"(?:{re.escape(MASK)})+")


@dataclass(frozen=True)
class Filled:
    """A text without masks.

    Attributes:
        text: the text.
        words: what was filled in for each mask, in order.
        probability: of each word: the geometric mean of its bytes'.
    """

    text: str
    words: tuple[str, ...]
    probability: tuple[float, ...]


def fill(model: nn.Module, texts: Sequence[str], mask_id: int = 3) -> list[Filled]:
    """Fill the masks of texts, each from left to right.

    A single `[MASK]` is a word of 1 to 12 bytes: the length with the most probable bytes is taken. Several next to each
    other are as many bytes.

    Args:
        model: logits over bytes for each position of `text` (see `perceiver.tasks.masked_language`).
        texts: the texts; those without a mask are returned as they are.
        mask_id: id of a masked byte.

    Raises:
        ValueError: a text has more bytes than the model's inputs, or more than 32 masks.
    """
    most = cast(Any, network(model)).example(1, "cpu")["text"].shape[1]
    split = [_split(text, most) for text in texts]  # all of them are checked before the first is filled
    return [_fill(model, *parts, most, mask_id) for parts in split]


def _split(text: str, most: int) -> tuple[list[bytes], list[int]]:
    """Return the parts between a text's masks, and for each mask how many stand next to each other."""
    parts = [part.encode() for part in _RUNS.split(text)]
    counts = [len(run) // len(MASK) for run in _RUNS.findall(text)]
    if len(counts) > MOST_MASKS:
        raise ValueError(f"{len(counts):,} masks in a text; wanted at most {MOST_MASKS}: give shorter texts")
    if counts and (least := 2 + sum(map(len, parts)) + sum(counts)) > most:
        raise ValueError(f"{least:,} tokens with its masks, the model has {most:,}")
    return parts, counts


def _fill(model: nn.Module, parts: Sequence[bytes], counts: Sequence[int], most: int, mask_id: int) -> Filled:
    words: list[bytes] = []
    shares: list[float] = []
    for place, count in enumerate(counts):
        before = b"".join(part + word for part, word in zip(parts, words, strict=False)) + parts[place]
        later = [GUESS if other == 1 else other for other in counts[place + 1 :]]
        lengths = range(1, LONGEST + 1) if count == 1 else [count]
        rows = [_ids(before, parts[place + 1 :], [length, *later], mask_id) for length in lengths]
        if len(rows[0]) > most:
            raise ValueError(f"{len(rows[0]):,} tokens with its masks, the model has {most:,}")
        rows = [row for row in rows if len(row) <= most]
        found = [
            _best(*each, len(before) + 1) for each in zip(_probabilities(model, rows, most), lengths, strict=False)
        ]
        word, share = max(found, key=lambda each: each[1])
        words.append(word)
        shares.append(share)
    filled = b"".join(part + word for part, word in zip(parts, [*words, b""], strict=True))
    return Filled(filled.decode("utf-8", "replace"), tuple(w.decode("utf-8", "replace") for w in words), tuple(shares))


def _ids(before: bytes, after: Sequence[bytes], lengths: Sequence[int], mask_id: int) -> list[int]:
    """Return the ids of a text up to a mask, and after it, with this many masked bytes at each mask."""
    ids = [CLS, *(byte + SPECIALS for byte in before)]
    for part, length in zip(after, lengths, strict=True):
        ids += [mask_id] * length + [byte + SPECIALS for byte in part]
    return [*ids, SEP]


def _probabilities(model: nn.Module, rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """Return the probabilities (B, M, 256) of the bytes at each of M = `length` positions."""
    device = next(model.parameters()).device
    ids = torch.full((len(rows), length), PAD, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    there = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    with torch.no_grad():
        logits = model({"text": ids.to(device), "text_mask": there.to(device)})
    return logits[..., SPECIALS : SPECIALS + 256].float().softmax(-1).cpu()


def _best(probability: Tensor, length: int, start: int) -> tuple[bytes, float]:
    """Return the most probable bytes of `length` positions from `start` on, and the geometric mean of them."""
    top = probability[start : start + length].max(-1)
    return bytes(top.indices.tolist()), float(top.values.log().mean().exp())
