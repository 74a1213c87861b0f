"""How well predictions and truth agree beyond accuracy and error: F1 and Matthews, Pearson and Spearman (as in GLUE).

Counts add up over workers. Spearman's correlation needs all samples: their numbers travel as the bits of float64.
"""

import math

import torch
from torch import Tensor


def class_counts(predicted: Tensor, labels: Tensor, valid: Tensor, classes: int) -> Tensor:
    """Return how often each class is predicted, is true, and both (3, K), float64, over the valid rows.

    Args:
        predicted, labels: (B,) int64; those of rows that are not valid may have any value.
        valid: (B,) bool.
        classes: K.
    """
    weight = valid.double()
    counts = torch.zeros(3, classes, dtype=torch.float64, device=predicted.device)
    labels = labels.clamp(0, classes - 1)
    counts[0].scatter_add_(0, predicted, weight)
    counts[1].scatter_add_(0, labels, weight)
    counts[2].scatter_add_(0, labels, weight * (predicted == labels))
    return counts


def class_figures(counts: Tensor) -> dict[str, float]:
    """Return `f1` and `matthews` from counts (3, K).

    F1 is that of the second class if there are two, else the mean over the classes that are true or predicted.
    Matthews' correlation is that of any number of classes (Gorodkin 2004, R_K); 0 if only one is predicted, or true.
    """
    predicted, true, right = counts
    there = predicted + true > 0
    f1 = 2 * right / (predicted + true).clamp(min=1)
    total, hits = true.sum(), right.sum()
    spread = (total**2 - predicted.square().sum()) * (total**2 - true.square().sum())
    matthews = float((hits * total - (predicted * true).sum()) / spread.sqrt()) if spread > 0 else 0.0
    mean = float(f1[there].mean()) if there.any() else 0.0
    return {"f1": float(f1[1]) if len(f1) == 2 else mean, "matthews": matthews}


def pearson(product: float, first: float, second: float, squares: tuple[float, float], n: float) -> float:
    """Return Pearson's correlation from sums of the products, of both values and of their squares; 0 without spread."""
    spreads = squares[0] - first**2 / n, squares[1] - second**2 / n
    if any(spread <= 1e-12 * square for spread, square in zip(spreads, squares, strict=True)):
        return 0.0
    return (product - first * second / n) / math.sqrt(spreads[0] * spreads[1])


def number_rows(found: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Return the valid pairs of numbers (n, 2) as int64, the bits of float64.

    Args:
        found, wanted: (B,).
        valid: (B,) bool.
    """
    return torch.stack([found, wanted], 1).double()[valid].contiguous().view(torch.int64)


def spearman(rows: Tensor) -> float:
    """Return Spearman's rank correlation of what `number_rows` returned; equal values share their mean rank."""
    if len(rows) < 2:
        return 0.0
    first, second = (_ranks(column) for column in rows.contiguous().view(torch.float64).T)
    sums = float((first * second).sum()), float(first.sum()), float(second.sum())
    return pearson(*sums, (float(first.square().sum()), float(second.square().sum())), len(rows))


def _ranks(values: Tensor) -> Tensor:
    """Return the rank (n,) of each value from 1 on, float64."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]
