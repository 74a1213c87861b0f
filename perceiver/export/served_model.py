"""The code of an exported MLflow model.

`perceiver export --format mlflow` lets MLflow copy this file and the package to the model's folder ("models from
code"). The folder contains safetensors, JSON and Python source, but no pickle.
"""

import json
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from perceiver.config import UserError
from perceiver.export.serving import Answers
from perceiver.export.weights import open_weights


class ServedModel(PythonModel):
    """Maps samples, as clients have them, to the task's predictions."""

    def load_context(self, context: Any) -> None:
        """Read the weights, the task and the names of the classes."""
        folder = Path(context.artifacts["weights"])
        facts = json.loads((folder / "task.json").read_text())
        saved = open_weights(str(folder / "model.safetensors"))
        self.answers = Answers(saved, facts["task"], facts["classes"], facts["view"])

    def predict(self, context, model_input, params=None):  # noqa: ANN001, ANN201, ARG002  MLflow would derive a schema from annotations
        """Answer a request; one that is wrong has status 400 and one line with the reason."""
        try:
            return self.answers(model_input)
        except (ValueError, UserError) as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


set_model(ServedModel())
