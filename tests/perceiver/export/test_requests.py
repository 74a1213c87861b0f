"""What clients send to a served model: texts, encoded images, and arrays whose types are checked."""

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perceiver.export.requests import Requests
from perceiver.export.serving import Answers
from perceiver.text_ids import byte_ids
from pipelines.features.text import byte_tokens
from pipelines.transforms.decode import decode_image
from pipelines.transforms.image import evaluation_view

PHOTO = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """Return pixels (H, W) or (H, W, C) as a PNG file."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


class Model(torch.nn.Module):
    """Has the inputs of a model and nothing else."""

    optional_keys = ("text_mask",)

    def __init__(self, **inputs: torch.Tensor) -> None:
        super().__init__()
        self.inputs = inputs

    def example(self, batch: int, device: Any) -> dict[str, torch.Tensor]:
        return self.inputs


IMAGES = Requests(Model(image=torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), {"eval_crop": 0.875})
TEXTS = Requests(Model(text=torch.zeros(1, 12, dtype=torch.int64)), {})


def arrays(requests: Requests, sent: Any) -> dict[str, Any]:
    """Return the arrays of a whole request."""
    return requests(requests.samples(sent))


@pytest.mark.parametrize(
    "text", ["", "abc", "Grüße, Ἀθήνα und mehr", "a question that is long\x1fyes", "no\x1fἈθήνα, Ἀθήνα"]
)
def test_texts_have_the_ids_of_training(text: str) -> None:
    ids, count = byte_tokens(text, 12)
    found = arrays(TEXTS, {"text": [text, "x"]})
    np.testing.assert_array_equal(found["text"][0], ids)
    assert found["text_mask"].sum(1).tolist() == [count, 3] and byte_ids(text, 12) == ids[:count].tolist()
    assert found["text"].dtype == np.int64


def test_encoded_images_are_shown_as_in_evaluations() -> None:
    encoded = png(PHOTO)
    text = base64.b64encode(encoded).decode()
    wanted = evaluation_view(decode_image(encoded, 3), (8, 8), 0.875)
    for sent in ([text, f"data:image/png;base64,{text}"], [encoded, encoded], np.array([text, text], dtype=object)):
        found = arrays(IMAGES, {"image": sent})["image"]
        assert found.shape == (2, 3, 8, 8) and found.dtype == np.uint8
        np.testing.assert_array_equal(found[0], wanted)
        np.testing.assert_array_equal(found[1], wanted)


def test_arrays_of_whole_numbers_are_taken() -> None:
    pixels = PHOTO[:8, :8].transpose(2, 0, 1)[None]
    for sent in (pixels, pixels.tolist(), pixels.astype(np.int64)):
        found = arrays(IMAGES, {"image": sent})["image"]
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, pixels)
    ids = np.array([byte_ids("abc", 12) + [0] * 7])
    found = arrays(TEXTS, {"text": ids, "text_mask": ids > 0})
    assert found["text"].tolist() == ids.tolist() and found["text_mask"].dtype == np.bool_


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"image": np.zeros((1, 3, 8, 8), np.float32)}, "image: got float32; wanted uint8"),
        ({"image": np.full((1, 3, 8, 8), 256)}, "whole numbers of 0 to 255"),
        ({"image": np.zeros((1, 3, 5, 8), np.uint8)}, r"image: got the shape \(1, 3, 5, 8\)"),
        ({"image": ["no base64!"]}, "image 0 cannot be decoded"),
        ({"image": [base64.b64encode(png(PHOTO)[:80]).decode()]}, "image 0 cannot be decoded"),
        ({"image": np.zeros((1, 3, 8, 8), np.uint8), "label": [1]}, "label: unknown input"),
        ({"picture": [1]}, "got the inputs picture; wanted samples by name: image"),
        ([1], "got list"),
    ],
)
def test_wrong_requests_are_refused(sent: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arrays(IMAGES, sent)


def test_numbers_that_are_not_finite_are_refused() -> None:
    points = Requests(Model(points=torch.zeros(1, 4, 3)), {})
    with pytest.raises(ValueError, match="NaN"):
        arrays(points, {"points": np.full((1, 4, 3), np.nan)})
    assert arrays(points, {"points": np.ones((1, 4, 3))})["points"].dtype == np.float32
    with pytest.raises(ValueError, match="too large ones for float32"):
        arrays(points, {"points": np.full((1, 4, 3), 1e39)})


def test_ids_outside_the_vocabulary_and_missing_inputs_are_refused() -> None:
    model = Model(text=torch.zeros(1, 4, dtype=torch.int64), audio=torch.zeros(1, 2))
    model.tokens = torch.nn.Embedding(262, 2)
    both = Requests(model, {})
    for ids in (262, -1):
        with pytest.raises(ValueError, match=f"text: got ids of .*{ids}.*; wanted ids of 0 to 261"):
            arrays(both, {"text": np.full((1, 4), ids), "audio": np.zeros((1, 2))})
    with pytest.raises(ValueError, match="got the inputs text without audio"):
        arrays(both, {"text": ["a"]})
    with pytest.raises(ValueError, match="audio: got a single value"):
        arrays(both, {"text": ["a"], "audio": 1})
    with pytest.raises(ValueError, match="text: got texts among other values"):
        arrays(both, {"text": [[1, 2], [3, "a"]], "audio": np.zeros((2, 2))})


def test_bytes_are_texts() -> None:
    sent = [[b"abc", b"\xff"], np.array([b"abc", b"\xff"])]
    for values in sent:
        found = arrays(TEXTS, {"text": values})["text"]
        assert found[0, :5].tolist() == byte_ids("abc", 12) and found[1, :5].tolist() == byte_ids("\ufffd", 12)


def answering(requests: Requests, task: Any) -> Answers:
    """Return the answers of a task to requests."""
    answers = object.__new__(Answers)
    answers.requests, answers.task, answers.net = requests, task, torch.nn.Identity()  # type: ignore[assignment]
    answers.device, answers.several, answers.classes = torch.device("cpu"), {}, np.array([])
    return answers


def last_is(values: np.ndarray, wrong: Any) -> np.ndarray:
    """Return 70 samples, more than a batch, of which the last one has this value."""
    found = np.repeat(values[None], 70, 0)
    found[69] = wrong
    return found


PIXELS, IDS = np.zeros((3, 8, 8), np.int64), np.zeros(12, np.int64)


@pytest.mark.parametrize(
    ("requests", "sent", "message"),
    [
        (IMAGES, {"image": np.zeros((70, 3, 5, 8), np.uint8)}, r"image: got the shape \(70, 3, 5, 8\)"),
        (IMAGES, {"image": last_is(PIXELS, 256)}, "image: got int64; wanted uint8: whole numbers of 0 to 255"),
        (IMAGES, {"image": [*PIXELS[None].tolist() * 69, [[1, 2], [3]]]}, "image: got samples of different shapes"),
        (IMAGES, {"image": [*["aaaa"] * 69, [1]]}, "image: got texts among other values"),
        (TEXTS, {"text": ["a"] * 70, "text_mask": np.ones((69, 12), np.bool_)}, "'text': 70, 'text_mask': 69"),
        (TEXTS, {"text": last_is(IDS, 4), "label": np.zeros(70)}, "label: unknown input"),
        (TEXTS, {"text": last_is(IDS, 4), "image": ["aaaa"] * 70}, "image: unknown input"),
    ],
)
def test_the_whole_request_is_checked_before_its_first_batch(requests: Requests, sent: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answering(requests, SimpleNamespace())(sent)


def test_ids_of_the_last_sample_and_texts_for_few_ids_are_refused_at_once() -> None:
    model = Model(text=torch.zeros(1, 12, dtype=torch.int64))
    model.tokens = torch.nn.Embedding(4, 2)
    answers = answering(Requests(model, {}), SimpleNamespace())
    with pytest.raises(ValueError, match="text: got ids of 0 to 4; wanted ids of 0 to 3"):
        answers({"text": last_is(IDS, 4)})
    with pytest.raises(ValueError, match="text: got texts; wanted ids of 0 to 3"):
        answers({"text": ["a"]})


def test_a_large_request_is_expanded_batch_by_batch() -> None:
    seen: list[int] = []
    task = SimpleNamespace(predict=lambda _, batch: seen.append(len(batch["text"])) or {"size": batch["text"].sum(1)})
    answers = answering(TEXTS, task)
    assert answers({"text": ["a"] * 130})["size"].shape == (130,) and seen == [64, 64, 2]
    with pytest.raises(ValueError, match="wanted at least one, and the same number in each"):
        answers({"text": np.zeros((0, 12), np.int64)})
