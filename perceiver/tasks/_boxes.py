"""Boxes of an image: overlap, matching of predictions to true boxes, average precision.

A box is cx, cy, w, h: centre, width and height, as shares of the image's width and height.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

WORST_COST = 1e6
"""Stands for a cost that is NaN or infinite: the loss, not the matching, reports a diverged model."""
RECALLS = np.linspace(0, 1, 101)
"""Recalls at which COCO's average precision reads the precision."""


def corners(boxes: Tensor) -> Tensor:
    """Return boxes (..., 4) as left, top, right, bottom."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union (...) of boxes (..., 4), which are broadcast; 0 where both have no area."""
    shared, union, _ = _areas(a, b)
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalized IoU (...), -1 to 1, of boxes (..., 4), which are broadcast (Rezatofighi et al. 2019).

    Each pair of boxes (N, 4) and (M, 4) has its place in `generalized_iou(a[:, None], b)`. The gradient moves boxes
    without overlap towards each other.
    """
    shared, union, hull = _areas(a, b)
    least = torch.finfo(union.dtype).tiny
    return shared / union.clamp(min=least) - (hull - union) / hull.clamp(min=least)


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the areas of intersection, union and smallest enclosing box of boxes (..., 4)."""
    a, b = corners(a), corners(b)
    inner = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    outer = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    shared = inner.clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return shared, union, outer.prod(-1)


def match(cost: Tensor, counts: Tensor) -> Tensor:
    """Assign a query to each true box so that the sum of the costs is least (the Hungarian method).

    Args:
        cost: (B, Q, R) of query q for true box r; NaN and infinity count as `WORST_COST`.
        counts: (B,) true boxes of each sample, which come first; negative: none.

    Returns:
        The query of each true box (B, R) int64, on the device of `cost`; -1 for padding, and for the boxes that are
        left over where a sample has more of them than there are queries.
    """
    from scipy.optimize import linear_sum_assignment

    costs = np.nan_to_num(cost.detach().float().cpu().numpy(), nan=WORST_COST, posinf=WORST_COST, neginf=WORST_COST)
    found = np.full((costs.shape[0], costs.shape[2]), -1, np.int64)
    for row, count in enumerate(counts.tolist()):
        if count > 0:
            queries, boxes = linear_sum_assignment(costs[row, :, :count])
            found[row, boxes] = queries
    return torch.from_numpy(found).to(cost.device)


def average_precision(boxes: ArrayLike, scores: ArrayLike, true: ArrayLike, iou: float = 0.5) -> float:
    """Return COCO's average precision of one sample's boxes, ranked by score: GPV-1's measure of localisation.

    From the best score on, a box takes the true box that it overlaps most among those that are left, if by at least
    `iou`; a box that takes none is a false one. Precision is read at 101 recalls.

    Args:
        boxes: (Q, 4) predictions.
        scores: (Q,) their relevance; of equal ones the first box comes first.
        true: (R, 4).
        iou: least overlap.

    Returns:
        0 to 1; NaN without true boxes, where precision is not defined.
    """
    wanted = torch.as_tensor(np.asarray(true, np.float64).reshape(-1, 4))
    if not len(wanted):
        return float("nan")
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    ranked = torch.as_tensor(np.asarray(boxes, np.float64).reshape(-1, 4)[order])
    hits = np.cumsum(_hits(box_iou(ranked[:, None], wanted).numpy(), iou))
    if not len(hits):
        return 0.0
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    places = np.searchsorted(hits / len(wanted), RECALLS, side="left")
    return float(np.append(precision, 0.0)[places].mean())


def _hits(overlap: NDArray[np.float64], least: float) -> NDArray[np.bool_]:
    """Return which boxes (Q,) take a true box, by their overlap (Q, R), best score first."""
    free = overlap.copy()
    hits = np.zeros(len(free), np.bool_)
    for row in range(len(free)):
        best = int(free[row].argmax())
        if free[row, best] >= least:
            hits[row] = True
            free[:, best] = -1.0
    return hits
