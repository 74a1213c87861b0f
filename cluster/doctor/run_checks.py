"""The doctor's checks of what a recipe's run asks for: its workers, data, output, MLflow and cluster."""

import os
import socket
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from cluster.doctor.report import FAIL, OK, WARN, Patient, Result, refusal
from cluster.recipe import preflight
from cluster.runtime.local import check_reachable
from perceiver.config import UserError
from perceiver.storage import first_line, is_local
from perceiver.tracking.redaction import redact_text, resolve
from pipelines.feed.ingest import check_files

ANSWER_S = 5


def check_workers(patient: Patient) -> Result:
    """Hold the recipe's workers and data tasks against this machine, as ``perceiver train`` does."""
    if patient.recipe is None:
        return OK, "no recipe given", ""
    wanted = f"cluster.workers = {patient.cluster.workers}"
    if patient.nodes or patient.cluster.resolved_address():
        return OK, f"{wanted}, on the cluster's nodes", ""
    try:
        cpus, gpus = preflight.check_machine(patient.recipe)
    except UserError as error:
        return refusal(FAIL, error)
    return OK, f"{wanted} on {cpus} CPUs and {gpus} GPUs", ""


def check_recipe_and_data(patient: Patient) -> Result:
    """Hold the recipe against its data: the manifest, the files that it lists, the model and the batch."""
    if patient.recipe is None:
        return OK, "no recipe given", ""
    try:
        model = preflight.check_recipe(patient.recipe)
        check_files(patient.recipe.data, model.manifest)
    except UserError as error:
        return refusal(patient.stops, error)
    rows = ", ".join(f"{split.samples:,} {name}" for name, split in model.manifest.splits.items())
    return OK, f"{redact_text(patient.recipe.data.url)}: {rows}; {model.parameters:,} parameters", ""


def check_output(patient: Patient) -> Result:
    """Write, read and delete a small object where runs are to go."""
    import fsspec

    place = f"{patient.output.rstrip('/')}/.doctor-{uuid.uuid4().hex}"
    shown = redact_text(patient.output)
    try:
        fs, path = fsspec.core.url_to_fs(place)
        parent = path.rsplit("/", 1)[0]
        made = not fs.exists(parent)
        fs.makedirs(parent, exist_ok=True)
        fs.pipe_file(path, b"doctor")
        same = fs.cat_file(path) == b"doctor"
        fs.rm_file(path)
        if made and is_local(fs):
            fs.rmdir(parent)
    except ImportError as error:
        return FAIL, f"{shown}: {error}", "pip install 'perceiver-train[s3]'"
    except Exception as error:  # noqa: BLE001  each store raises its own
        reason = first_line(error, 120)
        return (
            FAIL,
            f"{shown}: {redact_text(reason)}",
            "set output= to a place that you may write to; check its credentials",
        )
    return (OK, f"{shown}: written, read and deleted", "") if same else (FAIL, f"{shown}: read something else", "")


def check_tracking(patient: Patient) -> Result:
    """Ask MLflow's server whether it is there; one that is not stops a run with ``tracking.required`` only."""
    config = patient.tracking
    if not config.enabled:
        return OK, "off (tracking.enabled=false)", ""
    try:
        given = bool(config.uri or os.environ.get("MLFLOW_TRACKING_URI"))
        uri = resolve(config.store_uri(Path(patient.output)))
    except UserError as error:
        return refusal(patient.stops, error)
    if not given:
        return OK, "a SQLite file beside the runs", ""
    if uri.startswith(("sqlite:", "databricks")):
        return OK, redact_text(uri), ""
    if (reason := _no_answer(uri)) is None:
        return OK, f"{redact_text(uri)} answers", ""
    fix = "start it, or correct MLFLOW_TRACKING_URI or tracking.uri"
    if config.required:
        return patient.stops, f"{redact_text(uri)} {reason}", f"{fix}, or set tracking.required=false"
    return WARN, f"{redact_text(uri)} {reason}", f"{fix}; runs keep their metrics and send them later"


def _no_answer(uri: str) -> str | None:
    """Return why the server behind a URI counts as down, or None."""
    import requests

    parts = urlsplit(uri)
    try:
        if parts.scheme in ("http", "https"):
            answer = requests.get(f"{uri.rstrip('/')}/health", timeout=ANSWER_S)
            return None if answer.ok else f"answers with HTTP {answer.status_code}"
        port = parts.port or {"postgresql": 5432, "mysql": 3306, "mssql": 1433}.get(parts.scheme.partition("+")[0], 0)
        socket.create_connection((parts.hostname or "", port), timeout=ANSWER_S).close()
    except (OSError, requests.RequestException) as error:
        return f"does not answer ({type(error).__name__})"
    return None


def check_cluster(patient: Patient) -> Result:
    """Ask the cluster who it is, and whether the recipe's workers fit on it."""
    try:
        if patient.nodes is not None:
            return OK, patient.nodes(), ""
        address = patient.cluster.resolved_address()
        if address is None:
            return OK, "none asked about: runs start a Ray of their own", ""
        check_reachable(address)
    except UserError as error:
        return refusal(FAIL, error)
    return OK, f"something listens at {address}; --address asks its dashboard for nodes and room", ""
