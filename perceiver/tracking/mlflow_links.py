"""What a run is linked to in MLflow: its data sets, its newest and its best checkpoint. For the MLflow process."""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver.tracking.code import DISTRIBUTION, code_facts
from perceiver.tracking.mlflow_process import ENVIRONMENT
from perceiver.tracking.redaction import redact_text
from perceiver.tracking.runs import RunHandle

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("perceiver.tracking")

TAG_CHARACTERS = 8000
REFERENCE, REFERENCE_LOADER = "checkpoint.json", "perceiver.export.checkpoint_model"
"""The file of a best checkpoint's model in MLflow that contains its location, and the module that loads it."""


def import_mlflow() -> Any:
    """Import MLflow with telemetry and pickle loading off."""
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "False"
    import mlflow

    return mlflow


@contextmanager
def unless(code: str) -> Iterator[None]:
    """Ignore one error code of MLflow."""
    mlflow = import_mlflow()
    try:
        yield
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != code:
            raise


def log_datasets(client: "MlflowClient", run: "Run", handle: RunHandle) -> None:
    """Log the data sets of a run as its inputs, as `mlflow.log_input` does."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    there = {(found.dataset.name, found.dataset.digest) for found in (run.inputs.dataset_inputs if run.inputs else ())}
    inputs = [
        DatasetInput(
            Dataset(each["name"], each["digest"], "perceiver", each["source"], profile=each["profile"]),
            [InputTag("mlflow.data.context", each["context"])],
        )
        for each in handle.datasets
        if (each["name"], each["digest"]) not in there
    ]
    if not inputs:
        return
    try:
        client.log_inputs(run.info.run_id, inputs)
    except MlflowException as error:  # an older server has no such request; metrics matter more
        log.error("MLflow refuses the run's data sets (%s)", line(error))


def link_checkpoint(client: "MlflowClient", handle: RunHandle, uri: str) -> None:
    """Update the external model of the run, which refers to the newest checkpoint."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    assert handle.experiment_id is not None and handle.run_id is not None
    models = client.search_logged_models([handle.experiment_id], f"source_run_id = '{handle.run_id}'", max_results=1)
    if models:
        model = models[0]
    else:
        model = client.create_logged_model(handle.experiment_id, name="checkpoint", source_run_id=handle.run_id)
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    outputs = client.get_run(handle.run_id).outputs
    if outputs is None or model.model_id not in [output.model_id for output in outputs.model_outputs]:
        client.log_outputs(handle.run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.set_logged_model_tags(model.model_id, {"checkpoint_uri": uri[:TAG_CHARACTERS]})


def alias_best(client: "MlflowClient", handle: RunHandle, uri: str) -> None:
    """Set the alias `best` of the run's registered model to the best checkpoint.

    Each best checkpoint gets a version with the tag `checkpoint_uri`. Its artifacts are a model that refers to the
    checkpoint (`perceiver.export.checkpoint_model`); no weights are copied.
    """
    assert handle.run_id is not None
    name = re.sub(r"[^\w\-. ]", "_", f"{handle.experiment}.{handle.name}")
    with unless("RESOURCE_ALREADY_EXISTS"):
        client.create_registered_model(name, description="checkpoints that were the best of this run when saved")
    found = client.search_model_versions(f"name = '{name}'")
    version = next((each for each in found if each.tags.get("checkpoint_uri") == uri), None)
    if version is None:
        folder = f"best-checkpoint/{re.sub(r'[^A-Za-z0-9._-]', '_', uri.rstrip('/').rpartition('/')[2])}"
        _log_reference(client, handle.run_id, folder, uri)
        source = f"{client.get_run(handle.run_id).info.artifact_uri}/{folder}"
        version = client.create_model_version(name, source, handle.run_id, tags={"checkpoint_uri": uri})
    client.set_registered_model_alias(name, "best", version.version)


def _log_reference(client: "MlflowClient", run_id: str, folder: str, uri: str) -> None:
    """Log an MLflow model whose data are the location of a checkpoint."""
    with tempfile.TemporaryDirectory(prefix="mlflow-") as staging:
        reference, model = Path(staging, REFERENCE), Path(staging, "model")
        reference.write_text(json.dumps({"checkpoint_uri": uri}))
        package = f"{DISTRIBUTION}=={found}" if (found := code_facts().get("version")) else DISTRIBUTION
        import_mlflow().pyfunc.save_model(
            model, loader_module=REFERENCE_LOADER, data_path=str(reference), pip_requirements=[package]
        )
        client.log_artifacts(run_id, str(model), folder)


def line(error: Exception) -> str:
    """Return an error message in one line, without secrets."""
    return " ".join(redact_text(str(error)).split())[:500] or repr(error)
