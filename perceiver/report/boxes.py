"""Pictures of what a general model answers: its boxes with their relevance on the image, and what they attend to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from perceiver.report import figures
from perceiver.report.page import CardPart
from perceiver.tasks._boxes import average_precision
from perceiver.tracking.printable import printable

RELEVANT = 0.5
"""Relevance from which a box is drawn."""
DRAWN = 256
"""Least longest side of a picture in pixels; smaller images are enlarged by a whole factor."""
FOUND, TRUE = (217, 97, 15), (37, 99, 201)
CAPTION = 15
"""Size of the text below a picture in pixels."""


@dataclass(frozen=True)
class Answered:
    """An image and a task with what a model answers.

    Boxes are cx, cy, w, h in shares of the image.

    Attributes:
        image: (H, W, C) uint8.
        task: the task in words.
        boxes: (Q, 4).
        relevance: (Q,), 0 to 1.
        answer: the text.
        ended: whether the text has an end.
        true_boxes: (R, 4); None for samples that are not about boxes, or without targets.
        true_answer: the text; empty for none.
        maps: (h, w) attention of the relevant boxes, or of the text, to the image; None if there is none.
    """

    image: NDArray[np.uint8]
    task: str
    boxes: NDArray[np.floating]
    relevance: NDArray[np.floating]
    answer: str
    ended: bool = True
    true_boxes: NDArray[np.floating] | None = None
    true_answer: str = ""
    maps: NDArray[np.floating] | None = None

    @property
    def relevant(self) -> NDArray[np.floating]:
        """The boxes that are relevant (n, 4), the most relevant first."""
        order = np.argsort(-self.relevance, kind="stable")
        return self.boxes[order[self.relevance[order] >= RELEVANT]]

    @property
    def right(self) -> bool:
        """Whether the text is the true one, and the relevant boxes are those to find, each overlapping one by half."""
        if self.true_answer and not (self.ended and self.answer == self.true_answer):
            return False
        if self.true_boxes is None:
            return True
        found, wanted = self.relevant, self.true_boxes
        if not len(wanted) or len(found) != len(wanted):
            return len(found) == len(wanted)
        return average_precision(found, np.arange(len(found), 0, -1), wanted) > 1 - 1e-6

    @property
    def says(self) -> str:
        """The text, marked where it has no end."""
        return self.answer if self.ended else f"{self.answer}…"


def draw_boxes(answered: Answered, caption: bool = False) -> Image.Image:
    """Draw the relevant boxes with their relevance, true ones thin below them; with `caption` task and answer, too."""
    image = figures.picture(answered.image).convert("RGB")
    scale = max(1, -(-DRAWN // max(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    draw, wide = ImageDraw.Draw(image), max(1, max(image.size) // 160)
    font = ImageFont.load_default(max(11, max(image.size) // 24))
    true = np.zeros((0, 4)) if answered.true_boxes is None else answered.true_boxes
    for box in true:
        draw.rectangle(_corners(box, image), outline=TRUE, width=wide)
    if answered.true_answer and answered.true_boxes is None:
        return _captioned(image, answered) if caption else image  # its boxes are not asked for
    for box, share in zip(answered.boxes, answered.relevance, strict=True):
        if share >= RELEVANT:
            corners = _corners(box, image)
            draw.rectangle(corners, outline=FOUND, width=wide)
            draw.text(
                corners[:2], f"{share:.0%}", fill="white", font=font, stroke_width=max(1, wide), stroke_fill=FOUND
            )
    return _captioned(image, answered) if caption else image


def _corners(box: NDArray[np.floating], image: Image.Image) -> tuple[float, float, float, float]:
    centre, size = np.asarray(box[:2], float), np.asarray(box[2:], float)
    low, high = (np.clip(centre + side * size / 2, 0, 1) * (image.width - 1, image.height - 1) for side in (-1, 1))
    return float(low[0]), float(low[1]), float(max(high[0], low[0])), float(max(high[1], low[1]))


def _captioned(image: Image.Image, answered: Answered) -> Image.Image:
    """Return the picture with task and answer below it."""
    size = max(CAPTION, image.width // 30)
    font, lines = ImageFont.load_default(size), [printable(answered.task), f"> {printable(answered.says)}"]
    width = max(image.width, int(max(font.getlength(line) for line in lines)) + 2 * size)
    whole = Image.new("RGB", (width, image.height + int(size * 1.5) * len(lines) + size), "white")
    whole.paste(image, (0, 0))
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        draw.text((size // 2, image.height + size // 2 + int(size * 1.5) * number), line, fill="black", font=font)
    return whole


def answer_cards(answered: Mapping[str, Answered]) -> dict[str, list[dict[str, Any]]]:
    """Return the cards of the page, wrong answers and right ones, by the samples' keys.

    A card has the picture with the boxes, and the image with what boxes or text attend to if it is known.
    """
    cards: dict[str, list[dict[str, Any]]] = {"wrong": [], "right": []}
    for key, one in answered.items():
        parts = [CardPart("picture", figures.image_uri(draw_boxes(one)), one.task)]
        if one.maps is not None:
            drawn = figures.attention_map(one.maps.astype(np.float64), figures.picture(one.image).convert("RGB"))
            parts.append(CardPart("picture", figures.image_uri(drawn), "attention"))
        said = one.says if one.true_boxes is None else f"{len(one.relevant)} found"
        wanted = one.true_answer if one.true_boxes is None else f"{len(one.true_boxes)} to find"
        cards["right" if one.right else "wrong"].append(
            {"key": key, "parts": parts, "task": one.task, "said": said, "wanted": wanted}
        )
    return {kind: found for kind, found in cards.items() if found}
