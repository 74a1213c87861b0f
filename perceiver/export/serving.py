"""A trained model with its task, applied to requests: the implementation of a served model."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from pydantic import TypeAdapter

from perceiver.export.requests import Requests, as_text
from perceiver.export.weights import Saved, class_count
from perceiver.tasks import TaskConfig, build_task, known_classes
from perceiver.text_ids import byte_text

BATCH = 64
"""Largest number of samples per forward pass, to limit the memory of a large request."""


class Answers:
    """Maps samples by name, as `perceiver.export.requests.Requests` takes them, to the task's predictions.

    Args:
        saved: weights with their model's config.
        task: the recipe's `task` section.
        classes: names of the classes; empty if they have none.
        view: `eval_crop`, `stretch` and `max_pixels` of the recipe's `data` section.
    """

    def __init__(
        self,
        saved: Saved,
        task: Mapping[str, Any],
        classes: Sequence[str] = (),
        view: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net = saved.build().to(self.device)
        self.requests = Requests(self.net, view)
        self.classes = np.array(classes)
        assert saved.model is not None
        config = TypeAdapter(TaskConfig).validate_python(task)
        self.several = known_classes(config)
        self.task = build_task(config, classes=class_count(saved.model, saved.shapes) or len(classes))

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the task's outputs (`prediction`, `probability`, ...), and `class` where classes have names.

        A masked language model returns texts with their `[MASK]` filled as `text`; a general task's `answer` is a text.

        Raises:
            ValueError: see `Requests`. The whole request is checked before its first batch is computed, except for
                encoded images, which are decoded by batch.
        """
        samples = self.requests.samples(inputs)
        if hasattr(self.task, "fill") and isinstance(samples.get("text"), list):
            filled = [found.text for found in self._fill(as_text(samples["text"]))]
            return {"text": np.array(filled, dtype=object)}  # not as wide as the longest
        total = len(next(iter(samples.values())))
        parts = []
        with torch.no_grad():
            for start in range(0, total, BATCH):
                arrays = self.requests({name: values[start : start + BATCH] for name, values in samples.items()}, start)
                raw = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}
                batch = {name: values.to(self.device) for name, values in raw.items()}
                parts.append(self.task.predict(self.net, batch))
        found = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
        for name, classes in self.several.items():
            found[f"class_{name}"] = np.array(classes)[found[f"prediction_{name}"]]
        for name in getattr(self.task, "texts", ()):
            if name in found:
                found[name] = np.array([byte_text(ids) for ids in found[name].tolist()], dtype=object)
        best = found.get("prediction")
        if self.classes.size and best is not None and best.ndim == 1:
            found["class"] = self.classes[best]
        return found

    def _fill(self, texts: Sequence[str]) -> list[Any]:
        return cast(Any, self.task).fill(self.net, texts)


def view_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a recipe's `data` section decides how a sample is shown."""
    data = recipe.get("data") or {}
    return {name: data[name] for name in ("eval_crop", "stretch", "max_pixels") if name in data}
