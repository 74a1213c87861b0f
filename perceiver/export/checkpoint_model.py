"""The MLflow model of a run's best checkpoint: a reference to the checkpoint, which is read when it is loaded.

`models:/EXPERIMENT.RUN@best` contains this module's name and the checkpoint's location, no weights and no pickle.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from perceiver.config import UserError
from perceiver.export.serving import Answers
from perceiver.export.weights import open_weights
from perceiver.tracking.mlflow_links import REFERENCE


class CheckpointModel:
    """Maps raw tensors by name, samples along the first axis, to the task's predictions.

    Args:
        location: the checkpoint's folder, a path or URL that this machine can read.

    Raises:
        UserError: the checkpoint is gone or damaged, or its recipe has no task.
    """

    def __init__(self, location: str) -> None:
        saved = open_weights(location)
        task = saved.recipe.get("task")
        if not task:
            raise UserError(f"{location}: got weights without a recipe's task; wanted a checkpoint of a run")
        self.answers = Answers(saved, task, saved.data.classes if saved.data else ())
        self.like: dict[str, torch.Tensor] = cast(Any, self.answers.net).example(1, "cpu")

    def predict(self, model_input: Mapping[str, Any], params: Any = None) -> dict[str, np.ndarray]:
        """Answer a request.

        Raises:
            ValueError: an input is missing or unknown, of another shape, or its numbers are not of the input's type,
                such as pixels divided by 255.
        """
        if not isinstance(model_input, Mapping) or not self.like.keys() & model_input.keys():
            raise ValueError(f"wanted arrays by name: {', '.join(self.like)}")
        return self.answers({name: self._array(name, values) for name, values in model_input.items()})

    def _array(self, name: str, values: Any) -> np.ndarray:
        found = np.asarray(values)
        like = self.like.get(name)
        if like is None:
            return found
        wanted = like.numpy()
        if found.shape[1:] != wanted.shape[1:]:
            raise ValueError(f"{name}: got the shape {found.shape}; wanted {('samples', *wanted.shape[1:])}")
        if np.issubdtype(wanted.dtype, np.integer):
            limits = np.iinfo(wanted.dtype)
            whole = np.issubdtype(found.dtype, np.integer) or not found.size
            if not whole or (found.size and not limits.min <= found.min() <= found.max() <= limits.max):
                raise ValueError(
                    f"{name}: wanted whole numbers of {limits.min} to {limits.max}"
                    + (", pixels that are not divided by 255" if wanted.dtype == np.uint8 else "")
                )
        return found.astype(wanted.dtype)


def _load_pyfunc(data_path: str) -> CheckpointModel:
    """Return the model of a reference; MLflow calls it by this name."""
    path = Path(data_path)
    file = path / REFERENCE if path.is_dir() else path
    return CheckpointModel(json.loads(file.read_text())["checkpoint_uri"])
