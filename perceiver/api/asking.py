"""A general model is asked about photographs: `perceiver.ask`, `perceiver predict RUN photo.png --ask "..."`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perceiver.api.recipes import set_up
from perceiver.config import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from perceiver.api.recipes import Place
    from perceiver.export.weights import Saved


@dataclass(frozen=True)
class Reply:
    """What a model answers about an image.

    Attributes:
        key: the image's file.
        task: the task in words.
        answer: the text; characters that are not UTF-8 are U+FFFD.
        ended: whether the text has an end; otherwise the model had more to say than it can.
        boxes: (Q, 4) left, top, right, bottom in pixels of the image, the most relevant first.
        relevance: (Q,) from 0 to 1.
        picture: the image with its relevant boxes, task and answer.
    """

    key: str
    task: str
    answer: str
    ended: bool
    boxes: NDArray[np.float64]
    relevance: NDArray[np.float64]
    picture: "Image"

    def row(self) -> dict[str, Any]:
        """Return the reply as JSON has it: the boxes that are relevant."""
        from perceiver.report.boxes import RELEVANT

        relevant = self.relevance >= RELEVANT
        return {
            "key": self.key,
            "task": self.task,
            "answer": self.answer,
            "ended": self.ended,
            "boxes": self.boxes[relevant].round(1).tolist(),
            "relevance": self.relevance[relevant].round(4).tolist(),
        }


def ask(run: "Place", photo: "Place | Sequence[Place]", task: str) -> list[Reply]:
    """Ask a general model (task `general`) about photographs.

    Args:
        run: a `Run` or its folder, a checkpoint, or a safetensors export.
        photo: an image file, or several.
        task: what to do, in the words of the training data, such as "find every red digit".

    Raises:
        UserError: the model is none of a general task, the task is too long for it, or an image cannot be read.
    """
    from perceiver.export.weights import open_weights

    set_up()
    photos = (photo,) if isinstance(photo, str | os.PathLike) else photo
    return replies(open_weights(os.fspath(run)), [os.fspath(each) for each in photos], task)


def replies(saved: "Saved", photos: Sequence[str], task: str) -> list[Reply]:
    """Ask, see `ask`; the model is on the GPU if there is one."""
    from perceiver.export.serving import Answers, view_of

    section = saved.recipe.get("task") or {}
    if section.get("kind") != "general":
        raise UserError(
            f"--ask: {saved.place} has the task {section.get('kind')!r}; wanted a model of task.kind general"
        )
    if not photos:
        raise UserError("--ask: got no image; wanted image files, such as photo.png")
    view = view_of(saved.recipe)
    answers = Answers(saved, section, (), view)
    length, needs = answers.requests.like["text"].shape[1], len(task.encode()) + 2
    if not task.strip() or needs > length:
        raise UserError(f"--ask: got {needs} tokens (bytes and 2); wanted 3 to {length}, the text of the model")
    found = []
    for name in photos:
        encoded = _read(name)
        try:
            output = answers({"image": [encoded], "text": [task]})
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
        found.append(_reply(name, task, encoded, {key: values[0] for key, values in output.items()}, answers))
    return found


def _read(name: str) -> bytes:
    from perceiver.storage import first_line

    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"--ask: {name} cannot be read ({first_line(error)}); wanted an image file") from None


def _reply(name: str, task: str, encoded: bytes, output: dict[str, Any], answers: Any) -> Reply:
    """Return a reply with its boxes moved from the view that the model has seen to the image."""
    from perceiver.report.boxes import Answered, draw_boxes
    from pipelines.transforms.decode import MAX_PIXELS, decode_image
    from pipelines.transforms.image import evaluation_box

    view, like = answers.requests.view, answers.requests.like["image"]
    image = np.asarray(decode_image(encoded, like.shape[1], view.get("max_pixels", MAX_PIXELS)))
    height, width = image.shape[:2]
    crop, stretch = view.get("eval_crop", 1.0), view.get("stretch", False)
    left, top, right, bottom = evaluation_box(height, width, like.shape[2:], crop, stretch=stretch)
    order = np.argsort(-output["relevance"], kind="stable")
    boxes, relevance = output["boxes"][order].astype(float), output["relevance"][order].astype(float)
    scale = np.array([right - left, bottom - top])
    centre, size = np.array([left, top]) + boxes[:, :2] * scale, boxes[:, 2:] * scale
    whole = np.array([width, height])
    shown = Answered(
        image=image,
        task=task,
        boxes=np.concatenate([centre / whole, size / whole], axis=1),
        relevance=relevance,
        answer=str(output["answer"]),
        ended=bool(output["ended"]),
    )
    corners = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    corners = corners.clip(0, np.array([width, height, width, height]))
    drawn = draw_boxes(shown, caption=True)
    return Reply(name, task, shown.answer, shown.ended, corners, relevance, drawn)
