"""The MLflow run of a training run: settings, creation by the driver, and trackers.

MLflow is imported in a separate process only (`perceiver.tracking.mlflow_process`).
"""

import getpass
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from perceiver.config import Config, Location, Real, UserError, expand_home
from perceiver.storage import write_whole
from perceiver.tracking.code import code_tags
from perceiver.tracking.mlflow_process import ask
from perceiver.tracking.record import HISTORY, LOG, NOTES, RUN, LineWriter, unsent
from perceiver.tracking.redaction import flatten, redact, redact_text, resolve, server_address
from perceiver.tracking.tracker import NullTracker, RecordTracker, Status, Tracker
from perceiver.tracking.wandb_config import WandbConfig

log = logging.getLogger(__name__)

KEY_TAG = "perceiver.run"
Datasets = Sequence[Mapping[str, str]]
"""Data sets with the keys name, digest (up to 36 characters), source and profile (JSON), and context ("training")."""
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
SERVER_S = 10.0
ASK_S = 120.0
"""For `SERVER_S` and the import of MLflow, or the migrations of an SQLite store."""


class TrackingConfig(Config):
    """Tracking of a run with MLflow, TensorBoard and Weights & Biases (recipe key `tracking`)."""

    enabled: bool = Field(default=True, description="log to MLflow; the report and the checkpoints do not need it")
    uri: str | None = Field(
        default=None,
        description="MLflow server or store: http(s)://..., sqlite:///FILE, postgresql://...; or env:NAME, file:PATH; "
        "default: MLFLOW_TRACKING_URI, else a SQLite file mlflow.db in the run's output folder",
    )
    experiment: str | None = Field(
        default=None, description="MLflow experiment; default: MLFLOW_EXPERIMENT_NAME, else the recipe's name"
    )
    artifact_root: Location | None = Field(
        default=None,
        description="folder or URL for artifacts of a new experiment; default: next to a SQLite file, or the server's",
    )
    tags: dict[str, str] = Field(default_factory=dict, description="tags of the run")
    system_metrics: bool = Field(default=True, description="log CPU, memory, network and GPU load of each node")
    system_metrics_interval: Real = Field(
        default=10.0, ge=0.1, le=86_400, description="seconds between two samples of that load"
    )
    tensorboard: bool = Field(
        default=False,
        description="also write TensorBoard's event files to tensorboard/ in the run's folder, with or without MLflow",
    )
    wandb: WandbConfig | None = Field(
        default=None, description="also log to Weights & Biases, with or without MLflow; {} for the defaults"
    )
    required: bool = Field(
        default=False,
        description="refuse to start if the server does not answer; otherwise train, keep the metrics in the run's "
        "folder, and create the MLflow run when the server answers",
    )

    def store_uri(self, output: Path) -> str:
        """Return the URI or reference to use for a run whose output folder is `output`.

        Raises:
            UserError: MLflow has no store for the scheme, the URL is malformed, or a reference cannot be resolved.
        """
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(output.absolute() / "mlflow.db")
        if uri.startswith("sqlite:///~"):
            uri = sqlite_uri(Path(expand_home(uri.removeprefix("sqlite:///"))).absolute())
        server_address(resolve(uri), "tracking.uri (or MLFLOW_TRACKING_URI)")
        scheme = resolve(uri).partition(":")[0].partition("+")[0]
        if scheme not in SCHEMES:
            raise UserError(
                f"tracking.uri (or MLFLOW_TRACKING_URI): got {redact_text(uri)!r}, wanted http(s)://HOST, "
                "sqlite:///FILE or another database URL; MLflow does not support plain folders any more"
            )
        return uri


def sqlite_uri(file: Path) -> str:
    """Return the URI of an SQLite file, quoted only where SQLAlchemy would read another path (`a%20b`, `a?b`).

    MLflow creates the parent folder of the path as it is quoted, so a quoted path would leave an empty folder behind.

    Raises:
        UserError: this SQLAlchemy has no URI for the path; version 2.0 has none for special characters such as `?`.
    """
    from sqlalchemy.engine import URL, make_url

    plain = f"sqlite:///{file}"
    if make_url(plain).database == str(file):
        return plain
    quoted = URL.create("sqlite", database=str(file)).render_as_string(hide_password=False)
    if make_url(quoted).database != str(file):
        raise UserError(
            f"output: SQLAlchemy has no URI for {file}: rename the folder, or pip install 'sqlalchemy>=2.1'"
        )
    return quoted


@dataclass(frozen=True)
class RunHandle:
    """What a worker needs to log to a run; secrets given as references are not resolved in it.

    Attributes:
        uri: store, or a reference to it.
        experiment: name of the experiment.
        name: name of the run.
        key: the tag `perceiver.run`, which identifies the run in MLflow.
        created_ms: start of the run in milliseconds since the epoch; 0: as in MLflow.
        run_id: None until a server has answered; the first process that reaches the server creates the run.
        datasets: the data of the run, MLflow's inputs.
        worker_closes: whether the worker, not the driver, records the final status.
    """

    uri: str
    experiment: str
    name: str
    key: str
    created_ms: int
    run_id: str | None = None
    experiment_id: str | None = None
    artifact_root: Location | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    datasets: Datasets = ()
    system_metrics_interval: float | None = None
    worker_closes: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the handle as plain types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunHandle":
        """Return the handle for a result of `to_json`."""
        return cls(**data)


def load_handle(folder: Path) -> RunHandle | None:
    """Return the handle in a run's local folder; None if it was not tracked."""
    try:
        return RunHandle.from_json(json.loads((folder / RUN).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def save_handle(folder: Path, handle: RunHandle) -> None:
    """Write a handle for `load_handle`. A password in the URI is masked; a reader takes it from the configuration."""
    write_whole(folder / RUN, json.dumps({**handle.to_json(), "uri": redact_text(handle.uri)}, indent=1))


def create_run(
    config: TrackingConfig,
    name: str,
    *,
    output: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    changes: Mapping[str, str] | None = None,
    datasets: Datasets = (),
    resume: RunHandle | str | None = None,
) -> RunHandle | None:
    """Create the run, or reopen `resume` (a handle, or an MLflow run id). Called once, by the driver.

    As in MLflow, `MLFLOW_RUN_ID` is the id of a run to log to, and `MLFLOW_RUN_NAME` the name of a new one; `resume`
    has priority.

    Args:
        config: the recipe's `tracking`.
        name: name of the run, and of the experiment unless configured.
        output: the run's folder on a local disk; the default store is created in it.
        params: settings, nested or flat; they are flattened and redacted.
        tags: tags in addition to the configured ones.
        changes: tags that are also set if the run is continued.
        datasets: the data of the run.
        resume: the run to continue; its status becomes RUNNING again.

    Returns:
        The handle, also written to the folder; None if tracking is off. `run_id` is None if the server did not answer
        within about 10 s and `tracking.required` is false.

    Raises:
        UserError: the store refuses, or does not answer although it is required.
    """
    if not config.enabled:
        return None
    handle = _new_handle(config, name, output, params, tags)
    handle = replace(
        handle, datasets=tuple(redact(dict(each)) for each in datasets), name=os.environ.get("MLFLOW_RUN_NAME") or name
    )
    if isinstance(resume, RunHandle):
        handle = replace(handle, name=resume.name, key=resume.key, run_id=resume.run_id, created_ms=resume.created_ms)
    elif resume:
        handle = replace(handle, run_id=resume, created_ms=0)
    else:
        handle = replace(handle, run_id=os.environ.get("MLFLOW_RUN_ID") or None)
    reply = ask({"handle": handle.to_json()}, output / LOG, ASK_S)
    where, reason = redact_text(handle.uri), reply.get("refused") or reply.get("error")
    if "refused" in reply:
        raise UserError(f"MLflow at {where} refuses the run: {reason}")
    if reason and config.required:
        raise UserError(f"MLflow at {where} does not answer ({reason}); start it, or set tracking.required=false")
    if reason:
        log.warning(
            "MLflow at %s does not answer (%s): the run trains, its record is kept in %s", where, reason, output
        )
        return _begin(output, handle, changes)
    return _begin(output, RunHandle.from_json(reply["handle"]), changes)


def promise_run(
    config: TrackingConfig,
    name: str,
    *,
    output: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    datasets: Datasets = (),
) -> RunHandle | None:
    """Return the handle of a run that its worker's tracker creates and closes, so that the driver does not wait for it.

    Arguments as for `create_run`. A second call for a folder returns the same run. None if tracking is off.
    """
    if not config.enabled:
        return None
    handle = _new_handle(config, name, output, params, tags)
    handle = replace(handle, datasets=tuple(redact(dict(each)) for each in datasets), worker_closes=True)
    if before := load_handle(output):
        known = {"key": before.key, "run_id": before.run_id, "experiment_id": before.experiment_id}
        handle = replace(handle, **known, created_ms=before.created_ms)
    return _begin(output, handle)


def open_tracker(
    handle: RunHandle | None,
    folder: Path,
    *,
    history: str | None = None,
    system_metrics_node: str | None = None,
    close_timeout_s: float = 30.0,
    tensorboard: bool = False,
    wandb: Mapping[str, Any] | None = None,
) -> Tracker:
    """Return a tracker for the run. Returns immediately; MLflow is loaded in a separate process.

    The process also sends what earlier trackers of the folder could not send.

    Args:
        handle: from `create_run`; None: not logged to MLflow.
        folder: the run's folder on a local disk.
        history: rows of the checkpoint from which the run resumes, as JSON lines; they replace those in
            `history.jsonl`, because the steps after the checkpoint run again. None keeps the file.
        system_metrics_node: name under which the load of this machine is logged, "" on a single machine; None: not
            logged.
        close_timeout_s: seconds that `close` waits until everything is sent; 5 at most if the server is known to be
            down.
        tensorboard: whether to write TensorBoard's event files.
        wandb: the W&B run (`WandbConfig.request`); with none of the three, the result is a `NullTracker`.
    """
    if handle is None and not tensorboard and wandb is None:
        return NullTracker()
    run = handle.to_json() if handle is not None else None
    return RecordTracker(folder, run, history, system_metrics_node, close_timeout_s, tensorboard, wandb)


def reconcile(
    config: TrackingConfig,
    folder: Path,
    *,
    status: Status | None = None,
    history: str | None = None,
    timeout_s: float = 60.0,
) -> int:
    """Send the part of a run's record that MLflow lacks; return the number of lines that are still missing.

    Args:
        config: the recipe's `tracking`.
        folder: the run's folder on a local disk.
        status: final status of the run, if it is not recorded yet.
        history: rows of the newest checkpoint, as JSON lines; used if `history.jsonl` is shorter, because the run
            trained on another machine.
        timeout_s: seconds to try; 5 at most if the server is down.

    Raises:
        UserError: no run was tracked in this folder.
    """
    handle = load_handle(folder)
    if handle is None:
        raise UserError(f"{folder}: no tracked run; wanted the output folder of a run")
    handle = replace(handle, uri=config.store_uri(folder))
    here = (folder / HISTORY).stat().st_size if (folder / HISTORY).exists() else 0
    rows = history if history and len(history) > here else None
    tracker = open_tracker(handle, folder, history=rows, close_timeout_s=timeout_s)
    if status:
        tracker.close(status)
    tracker.detach()
    return unsent(folder)


def _new_handle(
    config: TrackingConfig, name: str, output: Path, params: Mapping[str, Any], tags: Mapping[str, str] | None
) -> RunHandle:
    standard = {"mlflow.user": _user(), "mlflow.source.name": "perceiver train", "mlflow.source.type": "LOCAL"}
    standard |= code_tags()
    return RunHandle(
        uri=config.store_uri(output),
        experiment=config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or name,
        name=name,
        key=uuid.uuid4().hex,
        created_ms=time.time_ns() // 1_000_000,
        artifact_root=config.artifact_root,
        tags={key: str(value) for key, value in redact({**standard, **config.tags, **(tags or {})}).items()},
        params={key: str(value) for key, value in redact(flatten(params)).items()},
        system_metrics_interval=config.system_metrics_interval if config.system_metrics else None,
    )


def _begin(folder: Path, handle: RunHandle, tags: Mapping[str, str] | None = None) -> RunHandle:
    """Write the handle to the run's folder, and record tags and the status `running`."""
    save_handle(folder, handle)
    notes = LineWriter(folder / NOTES)
    for key, value in redact(tags or {}).items():
        notes.append({"time": time.time(), "tag": key, "value": value})
    notes.append({"time": time.time(), "status": "running"})
    notes.close()
    return handle


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
