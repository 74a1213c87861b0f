"""The MLflow model of a run's best checkpoint: a reference to the checkpoint, which is read when it is loaded.

`models:/EXPERIMENT.RUN@best` contains this module's name and the checkpoint's location, no weights and no pickle.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perceiver.config import UserError
from perceiver.export.serving import Answers, view_of
from perceiver.export.weights import open_weights
from perceiver.tracking.mlflow_links import REFERENCE


class CheckpointModel:
    """Maps samples by name (see `perceiver.export.requests`) to the task's predictions.

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
        self.answers = Answers(saved, task, saved.data.classes if saved.data else (), view_of(saved.recipe))

    def predict(self, model_input: Mapping[str, Any], params: Any = None) -> dict[str, np.ndarray]:
        """Answer a request.

        Raises:
            ValueError: an input is missing or unknown, of another shape, or its numbers are not of the input's type,
                such as pixels divided by 255.
        """
        try:
            return self.answers(model_input)
        except UserError as error:
            raise ValueError(str(error)) from None


def _load_pyfunc(data_path: str) -> CheckpointModel:
    """Return the model of a reference; MLflow calls it by this name."""
    path = Path(data_path)
    file = path / REFERENCE if path.is_dir() else path
    return CheckpointModel(json.loads(file.read_text())["checkpoint_uri"])
