"""The helper process's side of MLflow: the only module that imports it, and only inside that process.

What the driver and the workers call is in `perceiver.tracking.runs` and offered here too.

Taking an event twice has the effect of taking it once: a metric's point carries the time it was logged at, and MLflow's
stores keep one point per (key, step, time, value); parameters and tags are the same text again; artifacts are
overwritten.
"""

import os
import posixpath
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from perceiver.tracking.helper import ENVIRONMENT, share_helper
from perceiver.tracking.redaction import MASK, is_reference, redact_text, resolve
from perceiver.tracking.runs import (
    KEY_TAG,
    RunHandle,
    TrackingConfig,
    create_run,
    load_handle,
    open_tracker,
    prewarm,
    promise_run,
    replay,
    spool_folder,
)
from perceiver.tracking.sidecar import Reply, serve
from perceiver.tracking.spool import Event, decode_number

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "RunHandle",
    "TrackingConfig",
    "create_run",
    "load_handle",
    "open_tracker",
    "prewarm",
    "promise_run",
    "replay",
    "share_helper",
    "spool_folder",
]

METRICS_PER_BATCH = 1000
TEXTS_PER_BATCH = 100
KEY_CHARACTERS = 250
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the page for training, not for agents
REFUSED = ("INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_STATE")


class RefusedError(Exception):
    """MLflow answers, and will not take this however often it is tried."""


def import_mlflow() -> Any:
    """Import MLflow with telemetry and pickle loading off."""
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "False"
    import mlflow

    return mlflow


def make_client(uri: str) -> "MlflowClient":
    """A client of the store at a URI or reference.

    Raises:
        RefusedError: MLflow has no such store.
    """
    mlflow = import_mlflow()
    try:
        return mlflow.MlflowClient(tracking_uri=resolve(uri), registry_uri=resolve(uri))
    except mlflow.exceptions.MlflowException as error:
        if error.error_code in REFUSED:
            raise RefusedError(str(error)) from error
        raise


def clean_key(key: str) -> str:
    """A metric, parameter or tag key that MLflow accepts: other characters become `_`, the path form is unique."""
    key = re.sub(r"[^\w\-. :/]", "_", key)
    return posixpath.normpath("/" + key).lstrip("/")[:KEY_CHARACTERS].rstrip("/") or "_"


def open_run(client: "MlflowClient", handle: RunHandle, *, create: bool = True) -> RunHandle | None:
    """Find the run of a handle and set it RUNNING, or create it with its parameters and tags.

    Returns:
        The handle with `run_id` and `experiment_id`; None if there is no such run and `create` is false.
    """
    found = _by_id(client, handle)
    experiment_id = _experiment(client, handle) if found is None else found.info.experiment_id
    found = found or _by_key(client, handle, experiment_id)
    if found is None and not create:
        return None
    if found is None:
        tags = {**handle.tags, KEY_TAG: handle.key}
        if handle.run_id:
            tags["resumed_from"] = handle.run_id
        run_id = client.create_run(
            experiment_id, start_time=handle.created_ms, tags=_clean_tags(tags), run_name=handle.name
        ).info.run_id
    else:
        run_id, experiment = found.info.run_id, client.get_experiment(experiment_id).name
        client.update_run(run_id, status="RUNNING")
        handle = replace(handle, key=found.data.tags.get(KEY_TAG, handle.key), experiment=experiment)
    handle = replace(handle, run_id=run_id, experiment_id=experiment_id)
    _log_params(client, run_id, handle.params)
    return handle


def _experiment(client: "MlflowClient", handle: RunHandle) -> str:
    """The experiment's id; it is created if missing."""
    mlflow = import_mlflow()
    for _ in range(2):
        experiment = client.get_experiment_by_name(handle.experiment)
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise RefusedError(
                f"experiment {handle.experiment!r} is deleted there; restore it or set tracking.experiment to another"
            )
        if experiment is not None:
            return experiment.experiment_id
        try:
            return client.create_experiment(handle.experiment, handle.artifact_root, tags=EXPERIMENT_TAGS)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    raise RefusedError(f"experiment {handle.experiment!r} can neither be found nor created")


def _by_id(client: "MlflowClient", handle: RunHandle) -> Any:
    """The MLflow run that the handle names, in whatever experiment, or None."""
    if not handle.run_id:
        return None
    mlflow = import_mlflow()
    try:
        run = client.get_run(handle.run_id)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _by_key(client: "MlflowClient", handle: RunHandle, experiment_id: str) -> Any:
    """The MLflow run of the experiment that has the handle's key, or None."""
    runs = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{handle.key}'", max_results=1)
    return runs[0] if runs else None


def deliver(client: "MlflowClient", handle: RunHandle, events: Sequence[Event]) -> list[tuple[int, str]]:
    """Log events in order; return the index and reason of each one that MLflow refuses for good."""
    mlflow = import_mlflow()
    rejected: list[tuple[int, str]] = []
    for group in _groups(events):
        try:
            _apply(client, handle, [events[index] for index in group])
        except (mlflow.exceptions.MlflowException, FileNotFoundError) as error:
            if not _refused(error):
                raise
            for index in group:
                rejected += _apply_alone(client, handle, index, events[index])
    return rejected


def _apply_alone(client: "MlflowClient", handle: RunHandle, index: int, event: Event) -> list[tuple[int, str]]:
    mlflow = import_mlflow()
    try:
        _apply(client, handle, [event])
    except (mlflow.exceptions.MlflowException, FileNotFoundError) as error:
        if not _refused(error):
            raise
        return [(index, redact_text(str(error)))]
    return []


def _refused(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"


def _groups(events: Sequence[Event]) -> Iterator[list[int]]:
    """Indices of consecutive metric events together, as many as fit a batch; every other event alone."""
    group: list[int] = []
    values = 0
    for index, event in enumerate(events):
        count = len(event["values"]) if event["kind"] == "metrics" else 0
        if group and (event["kind"] != "metrics" or values + count > METRICS_PER_BATCH):
            yield group
            group, values = [], 0
        if event["kind"] == "metrics":
            group.append(index)
            values += count
        else:
            yield [index]
    if group:
        yield group


def _apply(client: "MlflowClient", handle: RunHandle, events: Sequence[Event]) -> None:
    assert handle.run_id is not None
    event = events[0]
    match event["kind"]:
        case "metrics":
            _log_metrics(client, handle.run_id, events)
        case "params":
            _log_params(client, handle.run_id, event["values"])
        case "tag":
            client.set_tag(handle.run_id, clean_key(event["key"]), event["value"][:TAG_CHARACTERS])
            if event["key"] == "checkpoint_uri":
                _link_checkpoint(client, handle, event["value"])
            if event["key"] == "best_checkpoint_uri":
                _alias_best(client, handle, event["value"])
        case "artifact":
            _log_artifact(client, handle.run_id, Path(event["path"]), event["folder"] or None)
        case "status":
            client.set_terminated(handle.run_id, STATUS[event["value"]], end_time=event["time"])


def _log_metrics(client: "MlflowClient", run_id: str, events: Sequence[Event]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(clean_key(key), decode_number(value), event["time"], event["step"])
        for event in events
        for key, value in event["values"].items()
    ]
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])


def _log_params(client: "MlflowClient", run_id: str, params: dict[str, str]) -> None:
    """Log parameters. MLflow does not let one change: a new value of a resumed run becomes the tag `param.<key>`."""
    from mlflow.entities import Param

    wanted = {clean_key(key): value[:PARAM_CHARACTERS] for key, value in params.items()}
    there = client.get_run(run_id).data.params
    new = [Param(key, value) for key, value in wanted.items() if key not in there]
    for start in range(0, len(new), TEXTS_PER_BATCH):
        client.log_batch(run_id, params=new[start : start + TEXTS_PER_BATCH])
    for key, value in wanted.items():
        if key in there and there[key] != value:
            client.set_tag(run_id, clean_key(f"param.{key}"), value)


def _log_artifact(client: "MlflowClient", run_id: str, path: Path, folder: str | None) -> None:
    if path.is_dir():
        client.log_artifacts(run_id, str(path), folder)
    elif path.exists():
        client.log_artifact(run_id, str(path), folder)
    else:
        raise FileNotFoundError(f"artifact {path} does not exist")


def _link_checkpoint(client: "MlflowClient", handle: RunHandle, uri: str) -> None:
    """Keep one external model per run that names the newest checkpoint."""
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


def _alias_best(client: "MlflowClient", handle: RunHandle, uri: str) -> None:
    """Let the alias `best` of the run's registered model name the best checkpoint.

    A version is made for each best one, its tag `checkpoint_uri` says where it lies: the store wants a source of its
    own, and nothing is copied there.
    """
    mlflow = import_mlflow()
    assert handle.run_id is not None
    name = re.sub(r"[^\w\-. ]", "_", f"{handle.experiment}.{handle.name}")
    try:
        client.create_registered_model(name, description="checkpoints that were the best of this run when saved")
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = client.search_model_versions(f"name = '{name}'")
    version = next((each for each in found if each.tags.get("checkpoint_uri") == uri), None)
    if version is None:
        source = f"{client.get_run(handle.run_id).info.artifact_uri}/best-checkpoint"
        version = client.create_model_version(name, source, handle.run_id, tags={"checkpoint_uri": uri})
    client.set_registered_model_alias(name, "best", version.version)


def _clean_tags(tags: dict[str, str]) -> dict[str, str]:
    return {clean_key(key): value[:TAG_CHARACTERS] for key, value in tags.items()}


class Helper:
    """Answers the requests of `perceiver.tracking.runs`: load, open, send."""

    def __init__(self) -> None:
        self._clients: dict[str, MlflowClient] = {}
        self._handle: RunHandle | None = None

    def client(self, uri: str) -> "MlflowClient":
        """The client of a store, made once."""
        if uri not in self._clients:
            self._clients[uri] = make_client(uri)
        return self._clients[uri]

    def answer(self, request: dict[str, Any]) -> Reply:
        """Do what is asked; failures become answers whose `kind` is "refused" or a class name."""
        try:
            return self._answer(request)
        except Exception as error:  # noqa: BLE001 - whatever fails must become an answer, without secrets
            text = " ".join(redact_text(str(error)).split())[:500] or repr(error)
            refused = isinstance(error, RefusedError) or getattr(error, "error_code", "") in REFUSED
            return {"error": text, "kind": "refused" if refused else type(error).__name__}

    def _answer(self, request: dict[str, Any]) -> Reply:
        if request["op"] == "load":
            import_mlflow()
            return {}
        if request["op"] == "prewarm":
            self.client(request["uri"])
            return {}
        handle = RunHandle.from_json(request["handle"])
        if request["op"] == "open":
            opened = open_run(self.client(handle.uri), handle)
        else:
            opened = self._opened(handle, request["owner"])
        if opened is None:
            raise ConnectionError("the run is not there yet: the process that owns it has not reached the server")
        if request["op"] == "open":
            return {"handle": opened.to_json()}
        return {"handle": opened.to_json(), "rejected": deliver(self.client(handle.uri), opened, request["events"])}

    def _opened(self, handle: RunHandle, owner: bool) -> RunHandle | None:
        if handle.run_id is None or handle.experiment_id is None:
            return open_run(self.client(handle.uri), handle, create=owner)
        plain = resolve(handle.uri)
        if plain.startswith("sqlite:///") and not Path(plain.removeprefix("sqlite:///").partition("?")[0]).exists():
            raise ConnectionError("the SQLite file is not visible from this machine: use a server or a shared folder")
        return handle


class _Redacted:
    """A text stream that masks secrets before they reach the log file."""

    def __init__(self, stream: TextIO, secrets: Sequence[str]) -> None:
        self.stream, self.secrets = stream, secrets

    def write(self, text: str) -> int:
        for secret in self.secrets:
            text = text.replace(secret, MASK)
        return self.stream.write(redact_text(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def main(load: bool = False) -> None:
    """Run the helper process: open the store that `PERCEIVER_PREWARM` names, if any, then answer requests.

    Args:
        load: import MLflow before the first request.
    """
    uri = os.environ.pop("PERCEIVER_PREWARM", "")
    sys.stderr = _Redacted(sys.stderr, [resolve(uri)] if is_reference(uri) else [])
    helper = Helper()
    if uri:
        helper.answer({"op": "prewarm", "uri": uri})
    elif load:
        helper.answer({"op": "load"})
    serve(helper.answer)
