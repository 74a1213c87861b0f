"""Answers of a general model on the page: right and wrong ones, boxes where they are, what outputs attend to."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from perceiver.factory import build_model, input_maps, model_config
from perceiver.report.boxes import FOUND, TRUE, Answered, draw_boxes
from perceiver.report.run import ReportData, run_report
from tests.perceiver.api.test_asking import IO

BOX = np.array([[0.25, 0.5, 0.25, 0.5]])
FAR = np.array([[0.75, 0.5, 0.25, 0.5]])


def asked(**changes: Any) -> Answered:
    boxes, relevance = np.concatenate([BOX, FAR]), np.array([0.9, 0.2])
    image = np.zeros((64, 64, 3), np.uint8)
    one = Answered(image=image, task="find <b>", boxes=boxes, relevance=relevance, answer="", true_boxes=BOX)
    return replace(one, **changes)


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({}, True),
        ({"relevance": np.array([0.9, 0.8])}, False),
        ({"true_boxes": FAR}, False),
        ({"true_boxes": np.zeros((0, 4))}, False),
        ({"true_boxes": np.zeros((0, 4)), "relevance": np.zeros(2)}, True),
        ({"true_boxes": None, "answer": "two", "true_answer": "two"}, True),
        ({"true_boxes": None, "answer": "two", "true_answer": "two", "ended": False}, False),
        ({"true_boxes": None, "answer": "two", "true_answer": "three"}, False),
    ],
)
def test_right_and_wrong(changes, right):
    assert asked(**changes).right == right


def test_boxes_are_drawn_where_they_are():
    picture = np.asarray(draw_boxes(asked(true_boxes=FAR)))
    assert picture.shape == (256, 256, 3)
    colours = {colour: np.argwhere((picture == colour).all(-1)) for colour in (FOUND, TRUE)}
    # The label of the relevance is drawn from the corner on, to the right.
    assert abs(colours[FOUND][:, 1].min() - 255 * 0.125) <= 3 and abs(colours[TRUE][:, 1].max() - 255 * 0.875) <= 2
    assert abs(colours[TRUE][:, 0].min() - 255 * 0.25) <= 2 and abs(colours[TRUE][:, 0].max() - 255 * 0.75) <= 2


def test_the_page_shows_answers_and_what_they_attend_to():
    answers = {"a": asked(maps=np.eye(8)), "b": asked(true_boxes=FAR)}
    page = run_report(ReportData(name="a run", history=[], task="general", answered=answers))["index.html"].decode()
    assert "Answers: wrong" in page and "Answers: right" in page
    assert "find &lt;b&gt;" in page and page.count('alt="attention"') == 1


def test_outputs_attend_to_all_inputs():
    torch.manual_seed(0)
    model: Any = build_model(model_config(IO)).eval()
    mask = torch.arange(12).expand(2, -1) < 5
    raw = {**model.example(2, "cpu"), "text_mask": mask}
    weights = model.output_attention(raw)
    assert weights.shape == (2, 3 + 5, 16 * 16 + 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 8))
    assert not weights[..., -7:].any(), "padding"
    assert input_maps(model, weights)["image"].shape == (2, 8, 16, 16)
