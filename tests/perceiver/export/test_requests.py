"""What clients send to a served model: texts, encoded images, and arrays whose types are checked."""

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perceiver.export.requests import Requests
from perceiver.modalities.text import byte_ids
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


@pytest.mark.parametrize("text", ["", "abc", "Grüße, Ἀθήνα und mehr"])
def test_texts_have_the_ids_of_training(text: str) -> None:
    ids, count = byte_tokens(text, 12)
    found = TEXTS({"text": [text, "x"]})
    np.testing.assert_array_equal(found["text"][0], ids)
    assert found["text_mask"].sum(1).tolist() == [count, 3] and byte_ids(text, 12) == ids[:count].tolist()
    assert found["text"].dtype == np.int64


def test_encoded_images_are_shown_as_in_evaluations() -> None:
    encoded = png(PHOTO)
    text = base64.b64encode(encoded).decode()
    wanted = evaluation_view(decode_image(encoded, 3), (8, 8), 0.875)
    for sent in ([text, f"data:image/png;base64,{text}"], [encoded, encoded], np.array([text, text], dtype=object)):
        found = IMAGES({"image": sent})["image"]
        assert found.shape == (2, 3, 8, 8) and found.dtype == np.uint8
        np.testing.assert_array_equal(found[0], wanted)
        np.testing.assert_array_equal(found[1], wanted)


def test_arrays_of_whole_numbers_are_taken() -> None:
    pixels = PHOTO[:8, :8].transpose(2, 0, 1)[None]
    for sent in (pixels, pixels.tolist(), pixels.astype(np.int64)):
        found = IMAGES({"image": sent})["image"]
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, pixels)
    ids = np.array([byte_ids("abc", 12) + [0] * 7])
    found = TEXTS({"text": ids, "text_mask": ids > 0})
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
        IMAGES(sent)


def test_numbers_that_are_not_finite_are_refused() -> None:
    points = Requests(Model(points=torch.zeros(1, 4, 3)), {})
    with pytest.raises(ValueError, match="NaN"):
        points({"points": np.full((1, 4, 3), np.nan)})
    assert points({"points": np.ones((1, 4, 3))})["points"].dtype == np.float32
