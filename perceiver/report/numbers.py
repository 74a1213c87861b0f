"""The calculations of the report: which samples to show, confusion, figures per class, which latents to show."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LISTED_CLASSES = 20
WRONG_SHOWN, RIGHT_SHOWN = 24, 12
LATENTS_SHOWN = 6


def choose_examples(
    labels: NDArray[Any],
    predictions: NDArray[Any],
    confidence: NDArray[np.floating],
    wrong: int = WRONG_SHOWN,
    right: int = RIGHT_SHOWN,
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of the samples to show: the most confident mistakes, and right ones spread over the classes.

    Args:
        labels: (B,) int.
        predictions: (B,) int.
        confidence: (B,) probability of the predicted class.
        wrong: at most so many mistakes.
        right: at most so many right ones: of each class in turn the least confident first, so that they are the telling
            ones.
    """
    mistakes = np.flatnonzero(labels != predictions)
    mistakes = mistakes[np.argsort(-confidence[mistakes], kind="stable")][:wrong]
    hits = np.flatnonzero(labels == predictions)
    hits = hits[np.argsort(confidence[hits], kind="stable")]
    rank = np.zeros(len(hits), dtype=np.intp)
    for label in np.unique(labels[hits]):
        own = np.flatnonzero(labels[hits] == label)
        rank[own] = np.arange(len(own))
    order = np.lexsort((labels[hits], rank))
    return mistakes, hits[order][:right]


def confusion(labels: NDArray[Any], predictions: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """(K, K) counts: row = label, column = prediction."""
    flat = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def class_table(matrix: NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and count of each class; None where a figure has no denominator."""
    rows = []
    for index, name in enumerate(names):
        hit, count, guessed = int(matrix[index, index]), int(matrix[index].sum()), int(matrix[:, index].sum())
        precision, recall = ratio(hit, guessed), ratio(hit, count)
        f1 = ratio(2 * hit, count + guessed)
        rows.append({"name": str(name), "precision": precision, "recall": recall, "F1": f1, "count": count})
    return rows


def multilabel_table(
    labels: NDArray[Any], probabilities: NDArray[np.floating], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Precision and recall at probability 0.5, average precision and count of positives of each class."""
    rows = []
    for index, name in enumerate(class_names(names, labels.shape[1])):
        truth, score = labels[:, index] > 0.5, probabilities[:, index]
        guess = score >= 0.5
        hit, count = int((truth & guess).sum()), int(truth.sum())
        rows.append(
            {
                "name": name,
                "precision": ratio(hit, int(guess.sum())),
                "recall": ratio(hit, count),
                "average precision": average_precision(truth, score),
                "count": count,
            }
        )
    return rows


def average_precision(truth: NDArray[np.bool_], score: NDArray[np.floating]) -> float | None:
    """Mean of the precision at each positive, in order of falling score; None without positives."""
    if not truth.any():
        return None
    ranked = truth[np.argsort(-score, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(precision[ranked].mean())


def worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The classes with the lowest recall among those that occur, lowest first."""
    return sorted((row for row in rows if row["count"]), key=lambda row: row["recall"])[:LISTED_CLASSES]


def confused_pairs(matrix: NDArray[np.int64], names: Sequence[str], limit: int = 12) -> list[dict[str, Any]]:
    """The most frequent mistakes: label, prediction, how often, and as a share of the label's samples."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = [(int(index) // len(matrix), int(index) % len(matrix)) for index in order]
    return [
        {
            "label": names[row],
            "prediction": names[column],
            "count": int(wrong[row, column]),
            "share": wrong[row, column] / matrix[row].sum(),
        }
        for row, column in pairs
        if wrong[row, column]
    ]


def choose_latents(attention: NDArray[np.floating], count: int = LATENTS_SHOWN) -> list[int]:
    """Latents whose maps differ most: the most focused one, then each time the farthest from those already taken.

    Args:
        attention: (E, A, h, N, H, W).
        count: how many.
    """
    maps = np.moveaxis(np.nan_to_num(attention.mean(axis=2, dtype=np.float64)), 2, 0)
    flat = maps.reshape(maps.shape[0], -1)
    flat = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    chosen = [int(np.argmax(flat.max(axis=1)))]
    distance = 1 - flat @ flat[chosen[0]]
    while len(chosen) < min(count, len(flat)):
        distance[chosen] = -1.0
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, 1 - flat @ flat[chosen[-1]])
    return sorted(chosen)


def class_names(names: Sequence[str], classes: int) -> list[str]:
    """`classes` names: the given ones, and the number of a class that has none."""
    return [str(names[index]) if index < len(names) else str(index) for index in range(classes)]


def ratio(part: float, whole: float) -> float | None:
    """The quotient, or None without a denominator."""
    return part / whole if whole else None
