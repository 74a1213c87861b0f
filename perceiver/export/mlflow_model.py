"""Export as an MLflow model: with a signature, without a pickle, ready for `mlflow models serve`."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from perceiver.config import UserError
from perceiver.export.formats import describe_inputs, example, silent, write_weights
from perceiver.export.serving import Answers, view_of
from perceiver.export.weights import Saved
from perceiver.tracking.mlflow_links import import_mlflow
from perceiver.tracking.redaction import redact_text, resolve
from perceiver.tracking.runs import TrackingConfig

REQUIREMENTS = ("torch", "numpy", "pydantic", "pyyaml", "safetensors", "fsspec", "pillow", "simplejpeg")
"""Requirements of the served model; it contains this package itself."""
PACKAGES = ("perceiver", "pipelines")
"""What it contains: the model, and how images are decoded."""
NAME = "model"
EXAMPLE_VALUES = 200_000
"""Largest number of values in a sample for which the model contains an example request."""


def export_mlflow(saved: Saved, folder: Path, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Write an MLflow model, load it and compare its predictions for two samples with the original's.

    Args:
        saved: the weights and the recipe with the task.
        folder: where to write.
        classes: names of the classes, if the data has them.

    Raises:
        UserError: the weights have no recipe with a task.
    """
    mlflow = import_mlflow()
    inputs = _example(saved)
    with tempfile.TemporaryDirectory(prefix="mlflow-") as staging, silent():
        mlflow.pyfunc.save_model(folder, **_parts(mlflow, saved, Path(staging), classes))
        again = mlflow.pyfunc.load_model(str(folder)).predict(inputs)
    here = _answers(saved, classes)(inputs)
    different = [name for name in here if not np.array_equal(np.asarray(again[name]), here[name])]
    if different or again.keys() != here.keys():
        raise RuntimeError(f"mlflow: {(different or list(again))[0]} differs after loading")
    files = sorted(path.name for path in folder.iterdir())
    return {"files": files, **describe_inputs(example(saved.build(), 1)), "outputs": list(here)}


def register(saved: Saved, name: str, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Log the model to the run that trained it, and register it as the next version of a name.

    MLflow's store is the recipe's: `tracking.uri`, else MLFLOW_TRACKING_URI, else the SQLite file of `output`.

    Args:
        saved: weights, recipe and facts, which contain the run's id.
        name: name of the registered model.
        classes: as for `export_mlflow`.

    Returns:
        `name`, `version` and `model_uri`.

    Raises:
        UserError: MLflow does not answer, refuses, or has no such run.
    """
    mlflow = import_mlflow()
    run = saved.facts.get("mlflow_run")
    if not run:
        raise UserError(f"--register: {saved.place} has no MLflow run; wanted the folder of a tracked run")
    tracking = TrackingConfig.model_validate(saved.recipe.get("tracking", {}))
    uri = tracking.store_uri(Path(saved.recipe.get("output", "runs")))
    # MLflow's default must not be set afterwards: later runs would go to a file in the current folder.
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
    mlflow.set_tracking_uri(resolve(uri))
    try:
        # Otherwise the model is logged to the default experiment, whose artifacts may be below the current folder.
        os.environ["MLFLOW_EXPERIMENT_ID"] = mlflow.get_run(run).info.experiment_id
        with tempfile.TemporaryDirectory(prefix="mlflow-") as staging, silent():
            parts = _parts(mlflow, saved, Path(staging), classes)
            logged = mlflow.models.Model.log(
                artifact_path=None, name=NAME, flavor=mlflow.pyfunc, run_id=run, registered_model_name=name, **parts
            )
    except (mlflow.exceptions.MlflowException, OSError) as error:
        said = " ".join(redact_text(str(error)).split())[:300]
        raise UserError(f"--register: MLflow at {redact_text(uri)} refuses the model ({said})") from None
    finally:
        mlflow.set_tracking_uri(before)
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
        if experiment is not None:
            os.environ["MLFLOW_EXPERIMENT_ID"] = experiment
    return {"name": name, "version": int(logged.registered_model_version), "model_uri": logged.model_uri}


def _parts(mlflow: Any, saved: Saved, staging: Path, classes: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of MLflow's save and log: the code, the weights, the signature."""
    weights = staging / "weights"
    weights.mkdir()
    write_weights(saved, weights)
    (weights / "task.json").write_text(
        json.dumps({"task": _task(saved), "classes": classes, "view": view_of(saved.recipe)})
    )
    inputs = _example(saved)
    package = Path(__file__).parents[1]
    # Without inputs: MLflow would convert the numbers of a JSON request to the signature's type before it checks them.
    outputs = mlflow.models.infer_signature(inputs, _answers(saved, classes)(inputs)).outputs
    return {
        "python_model": str(package / "export" / "served_model.py"),
        "artifacts": {"weights": str(weights)},
        "code_paths": [str(package.parent / name) for name in PACKAGES],
        "signature": mlflow.models.ModelSignature(outputs=outputs),
        "pip_requirements": [f"{each}=={version(each).partition('+')[0]}" for each in REQUIREMENTS],
        "input_example": {name: values[:1] for name, values in inputs.items()} if _small(inputs) else None,
        "metadata": {"recipe": saved.recipe.get("name"), "step": saved.facts.get("step")},
    }


def _answers(saved: Saved, classes: Sequence[str]) -> Answers:
    return Answers(saved, _task(saved), classes, view_of(saved.recipe))


def _task(saved: Saved) -> Mapping[str, Any]:
    task = saved.recipe.get("task")
    if not task:
        raise UserError(f"{saved.place}: got weights without a recipe's task; wanted the folder of a run")
    return task


def _small(inputs: Mapping[str, np.ndarray]) -> bool:
    """Return whether one sample is small enough for an example request."""
    return sum(values[0].size for values in inputs.values()) <= EXAMPLE_VALUES


def _example(saved: Saved) -> dict[str, np.ndarray]:
    """Return two random samples."""
    return {name: values.numpy() for name, values in example(saved.build(), 2).items()}
