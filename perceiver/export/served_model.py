"""The code of an exported MLflow model.

`perceiver export --format mlflow` lets MLflow copy this file and the package to the model's folder ("models from
code"). The folder contains safetensors, JSON and Python source, but no pickle.
"""

import json
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from perceiver.export.serving import Answers
from perceiver.export.weights import open_weights


class ServedModel(PythonModel):
    """Maps raw tensors to the task's predictions."""

    def load_context(self, context: Any) -> None:
        """Read the weights, the task and the names of the classes."""
        folder = Path(context.artifacts["weights"])
        facts = json.loads((folder / "task.json").read_text())
        self.answers = Answers(open_weights(str(folder / "model.safetensors")), facts["task"], facts["classes"])

    def predict(self, context, model_input, params=None):  # noqa: ANN001, ANN201, ARG002  MLflow would derive a schema from annotations
        """Answer a request that fits the signature."""
        return self.answers(model_input)


set_model(ServedModel())
