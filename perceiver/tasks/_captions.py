"""Metrics of texts: exact match, and CIDEr-D (Vedantam, Zitnick, Parikh, CVPR 2015)."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

MOST_WORDS = 4
"""Longest n-grams."""
SIGMA = 6.0
"""Standard deviation of the penalty on a difference in length, in n-grams."""
SCALE = 10.0

Ngrams = Mapping[tuple[str, ...], float]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def exact_match(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
    """Return for each candidate whether it has the words of one of its references, in their order."""
    return np.array(
        [words(text) in [words(one) for one in wanted] for text, wanted in zip(candidates, references, strict=True)],
        np.bool_,
    )


def document_frequencies(references: Sequence[Sequence[str]]) -> Counter[tuple[str, ...]]:
    """Return in the references of how many samples each n-gram of 1 to 4 words is."""
    found: Counter[tuple[str, ...]] = Counter()
    for wanted in references:
        found.update({ngram for text in wanted for ngram in _ngrams(text)})
    return found


def cider_d(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    frequencies: Mapping[tuple[str, ...], int] | None = None,
    samples: int | None = None,
) -> NDArray[np.float64]:
    """Return CIDEr-D of each candidate, 0 to 10; a corpus has their mean.

    N-grams are weighted by count and by the logarithm of the inverse share of samples that have them. So n-grams of
    all samples weigh nothing, and a corpus of one sample has 0 throughout. Words are those of `words`, where
    COCO's evaluation uses the tokenizer of the Penn Treebank.

    Args:
        candidates: a text for each sample.
        references: one or several texts for each sample.
        frequencies: `document_frequencies` of the corpus; None: these references are the corpus.
        samples: number of samples of that corpus; None: of these references.
    """
    known = document_frequencies(references) if frequencies is None else frequencies
    total = math.log(max(1, len(references) if samples is None else samples))
    scores = []
    for text, wanted in zip(candidates, references, strict=True):
        ours = _weighted(text, known, total)
        similar = [
            _similarity(ours, _weighted(one, known, total), len(words(text)) - len(words(one))) for one in wanted
        ]
        scores.append(SCALE * float(np.mean(similar)) if similar else 0.0)
    return np.array(scores, np.float64)


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    found = words(text)
    return Counter(
        tuple(found[start : start + size])
        for size in range(1, MOST_WORDS + 1)
        for start in range(len(found) - size + 1)
    )


def _weighted(text: str, frequencies: Mapping[tuple[str, ...], int], total: float) -> Sequence[Ngrams]:
    """Return the weights of a text's n-grams, apart for each n."""
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(MOST_WORDS)]
    for ngram, count in _ngrams(text).items():
        weights[len(ngram) - 1][ngram] = count * (total - math.log(max(1, frequencies.get(ngram, 0))))
    return weights


def _similarity(ours: Sequence[Ngrams], theirs: Sequence[Ngrams], longer: int) -> float:
    """Return the mean over n of the clipped cosine of two texts' n-grams, times the penalty on the length."""
    values = []
    for mine, other in zip(ours, theirs, strict=True):
        norm = math.sqrt(sum(weight**2 for weight in mine.values()) * sum(weight**2 for weight in other.values()))
        shared = sum(min(weight, other.get(ngram, 0.0)) * other.get(ngram, 0.0) for ngram, weight in mine.items())
        values.append(shared / norm if norm else 0.0)
    return float(np.mean(values)) * math.exp(-(longer**2) / (2 * SIGMA**2))
