"""Boxes: overlap against counted pixels, matching against all assignments, average precision against pycocotools."""

import contextlib
import io
import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from perceiver.tasks._boxes import average_precision, box_iou, corners, generalized_iou, match

SIDE = 16
Boxes = NDArray[np.float64]


def some_boxes(count: int, rng: np.random.Generator) -> tuple[Boxes, Boxes]:
    """Return boxes with corners on whole pixels of a picture of side 16: as left, top, right, bottom, and as shares."""
    low = rng.integers(0, SIDE - 1, (count, 2))
    high = rng.integers(low + 1, SIDE + 1)
    return np.concatenate([low, high], 1), np.concatenate([(low + high) / 2, high - low], 1) / SIDE


def pixels(box: Boxes) -> NDArray[np.bool_]:
    picture = np.zeros((SIDE, SIDE), bool)
    left, top, right, bottom = box.astype(int)
    picture[top:bottom, left:right] = True
    return picture


def test_overlaps_are_those_of_counted_pixels() -> None:
    edges, shares = some_boxes(24, np.random.default_rng(0))
    found = torch.from_numpy(shares)
    assert np.allclose(corners(found) * SIDE, edges)
    iou, general = box_iou(found[:, None], found).numpy(), generalized_iou(found[:, None], found).numpy()
    for i, j in itertools.product(range(24), repeat=2):
        a, b = pixels(edges[i]), pixels(edges[j])
        ys, xs = np.nonzero(a | b)
        hull = (ys.max() + 1 - ys.min()) * (xs.max() + 1 - xs.min())
        assert iou[i, j] == pytest.approx((a & b).sum() / (a | b).sum())
        assert general[i, j] == pytest.approx(iou[i, j] - (hull - (a | b).sum()) / hull)


def test_boxes_without_area_have_no_overlap_and_finite_gradients() -> None:
    point = torch.full((1, 4), 0.5)
    point[:, 2:] = 0
    point.requires_grad_()
    assert box_iou(point, point).item() == generalized_iou(point, point).item() == 0
    generalized_iou(point, torch.tensor([0.2, 0.2, 0.1, 0.1])).sum().backward()
    assert point.grad is not None and point.grad.isfinite().all()


def test_a_step_along_the_gradient_moves_disjoint_boxes_together() -> None:
    box = torch.tensor([0.2, 0.2, 0.1, 0.1], requires_grad=True)
    generalized_iou(box, torch.tensor([0.8, 0.7, 0.1, 0.1])).backward()
    assert box.grad is not None and box.grad[0] > 0 and box.grad[1] > 0


def test_the_matching_is_the_cheapest_of_all() -> None:
    cost = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 5, 4)))
    counts = torch.tensor([4, 3, 2, 1, 0, -1])
    found, costs = match(cost, counts), cost.tolist()
    for row, count in enumerate(counts.clamp(min=0).tolist()):
        queries = found[row, :count].tolist()
        least = min(
            sum(costs[row][q][r] for r, q in enumerate(order)) for order in itertools.permutations(range(5), count)
        )
        assert len(set(queries)) == count and sum(costs[row][q][r] for r, q in enumerate(queries)) == least
        assert found[row, count:].tolist() == [-1] * (4 - count)


def test_more_boxes_than_queries_leave_the_dearest_unmatched() -> None:
    cost = torch.tensor([[[0.0, 5.0, 1.0], [0.0, 5.0, 1.0]]])
    assert sorted(match(cost, torch.tensor([3])).tolist()[0]) == [-1, 0, 1]
    assert match(cost, torch.tensor([3]))[0, 1] == -1


def test_a_diverged_model_is_matched_all_the_same() -> None:
    cost = torch.tensor([[[math.nan, 1.0], [math.inf, math.nan]]])
    assert sorted(match(cost, torch.tensor([2])).tolist()[0]) == [0, 1]


def coco(boxes: Boxes, scores: Boxes, true: Boxes, iou: float) -> float:
    """Return pycocotools' average precision of one image and one category."""

    def entry(box: Boxes) -> dict[str, object]:
        cx, cy, width, height = (box * 100).tolist()
        return {"image_id": 1, "category_id": 1, "bbox": [cx - width / 2, cy - height / 2, width, height]}

    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {
            "info": {},
            "images": [{"id": 1}],
            "categories": [{"id": 1}],
            "annotations": [
                {**entry(box), "id": number + 1, "area": float(box[2] * box[3]), "iscrowd": 0}
                for number, box in enumerate(true)
            ],
        }
        dataset.createIndex()
        results = dataset.loadRes([{**entry(box), "score": score} for box, score in zip(boxes, scores.tolist())])
        run = COCOeval(dataset, results, "bbox")
        run.params.iouThrs = np.array([iou])
        run.evaluate()
        run.accumulate()
    return float(run.eval["precision"][0, :, 0, 0, -1].mean())


def test_average_precision_is_that_of_pycocotools() -> None:
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(60):
        _, true = some_boxes(int(rng.integers(1, 6)), rng)
        near = np.repeat(true, 2, axis=0) + rng.normal(0, 0.02, (2 * len(true), 4))
        boxes = np.concatenate([near, some_boxes(4, rng)[1]]).clip(0.01, 1)
        scores, iou = rng.random(len(boxes)), float(rng.choice([0.3, 0.5, 0.75]))
        found = average_precision(boxes, scores, true, iou)
        assert found == pytest.approx(coco(boxes, scores, true, iou), abs=1e-9)
        seen.add(round(found, 3))
    assert len(seen) > 30


def test_average_precision_of_the_ends() -> None:
    true = [[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]]
    assert average_precision(true, [0.1, 0.9], true) == 1
    assert average_precision(np.zeros((0, 4)), [], true) == 0
    assert average_precision([[0.5, 0.5, 0.1, 0.1], true[0]], [0.9, 0.8], true[:1]) == 0.5
    assert average_precision([true[0], true[0]], [0.9, 0.8], true) == pytest.approx(51 / 101)
    assert math.isnan(average_precision(true, [0.1, 0.9], []))
