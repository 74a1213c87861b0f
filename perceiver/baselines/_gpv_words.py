"""The words of GPV-1's answers: a vocabulary of the training answers, and texts as ids of its words."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from perceiver.text_ids import SEP, SPECIALS, byte_text

PAD, START, END, UNKNOWN = range(4)
SPECIAL_WORDS = 4
"""The ids before those of the words: padding, the start and the end of an answer, and a word that is not known."""
STRANGE = "\ufffd"
"""Stands for a word that is not known."""
_PIECES = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
_NO_SPACE_BEFORE = re.compile(r" (?=[,.;:!?%)])")


def split_words(text: str) -> list[str]:
    """Return the words and signs of a text."""
    return _PIECES.findall(text)


def count_words(texts: Iterable[str], least: int = 1) -> tuple[tuple[str, ...], int]:
    """Return the words that occur at least `least` times in texts, in alphabetical order, and the most of a text."""
    counts, longest = Counter[str](), 0
    for text in texts:
        found = split_words(text)
        counts.update(found)
        longest = max(longest, len(found))
    return tuple(sorted(word for word, count in counts.items() if count >= least)), longest


class Words:
    """Maps answers in bytes to ids of words and back.

    Args:
        words: the vocabulary, without special words.
        length: most words of an answer, its end included.
    """

    def __init__(self, words: Sequence[str], length: int) -> None:
        self.words, self.length = tuple(words), length
        self.ids = {word: number for number, word in enumerate(words, SPECIAL_WORDS)}
        self.size = len(words) + SPECIAL_WORDS
        longest = max(len(word.encode()) for word in (*words, STRANGE))
        self.width = length * (longest + 1)
        """Bytes of the longest text."""

    def encode(self, answer: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids (B, length) of answers of byte ids (B, T), up to their end, and where there is one (B, length).

        A row without an answer has none. A longer answer is cut before its end, so that a decoded one is never the
        same; those of training are refused before it starts.
        """
        ids = torch.zeros(len(answer), self.length, dtype=torch.int64)
        counts = torch.zeros(len(answer), 1, dtype=torch.int64)
        for row, (numbers, there) in enumerate(zip(answer.tolist(), mask.any(1).tolist(), strict=True)):
            if there:
                found = [*(self.ids.get(word, UNKNOWN) for word in split_words(byte_text(numbers))), END]
                found = found[: self.length]
                ids[row, : len(found)], counts[row] = torch.tensor(found), len(found)
        return ids.to(answer.device), (torch.arange(self.length) < counts).to(answer.device)

    def bytes(self, ids: Tensor) -> Tensor:
        """Return the texts of ids of words (B, length) as byte ids (B, width): up to their end if there is one."""
        result = torch.zeros(len(ids), self.width + 1, dtype=torch.int64)
        for row, numbers in enumerate(ids.tolist()):
            ended = END in numbers
            numbers = numbers[: numbers.index(END)] if ended else numbers
            known = [number for number in numbers if number >= UNKNOWN]
            words = [STRANGE if number == UNKNOWN else self.words[number - SPECIAL_WORDS] for number in known]
            text = _NO_SPACE_BEFORE.sub("", " ".join(words)).encode()
            found = [byte + SPECIALS for byte in text] + [SEP] * ended
            result[row, : len(found)] = torch.tensor(found, dtype=torch.int64)
        return result.to(ids.device)
