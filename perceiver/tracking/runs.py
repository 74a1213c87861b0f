"""Runs in MLflow, as the driver and the workers see them: the driver creates or reopens one, workers log into it.

MLflow is imported in a helper process only (`perceiver.tracking.sidecar`), so neither its import (1 to 4 s), nor the
migrations of a fresh SQLite store, nor its retries against a server that is down reach the driver or the training loop.
"""

import getpass
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat

from perceiver.config import Config, UserError
from perceiver.tracking.helper import helper_process
from perceiver.tracking.redaction import flatten, redact, redact_text, resolve
from perceiver.tracking.sidecar import Reply, Sidecar, SidecarError
from perceiver.tracking.spool import Event, unsent
from perceiver.tracking.system_metrics import SystemMetrics
from perceiver.tracking.tracker import NullTracker, SendError, SpoolTracker

log = logging.getLogger(__name__)

KEY_TAG = "perceiver.run"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
LOAD_S = 60.0
SERVER_S = 10.0
SEND_S = 60.0
ARTIFACT_BYTES_PER_S = 1e6


class TrackingConfig(Config):
    """Where the figures of a run go (recipe key `tracking`)."""

    enabled: bool = Field(default=True, description="log to MLflow; the report and the checkpoints do not need it")
    uri: str | None = Field(
        default=None,
        description="MLflow server or store: http(s)://..., sqlite:///FILE, postgresql://...; or env:NAME, file:PATH; "
        "default: MLFLOW_TRACKING_URI, else a SQLite file mlflow.db in the run's output folder",
    )
    experiment: str | None = Field(
        default=None, description="MLflow experiment; default: MLFLOW_EXPERIMENT_NAME, else the recipe's name"
    )
    artifact_root: str | None = Field(
        default=None,
        description="folder or URL for artifacts of a new experiment; by default beside a SQLite file or the server's",
    )
    tags: dict[str, str] = Field(default_factory=dict, description="tags of the run")
    system_metrics: bool = Field(default=True, description="log CPU, memory, network and GPU load of each node")
    system_metrics_interval: PositiveFloat = Field(default=10.0, description="seconds between two samples of that load")
    required: bool = Field(
        default=False,
        description="refuse to start when the server does not answer; otherwise train, keep everything in the spool, "
        "and create the run when it answers",
    )

    def store_uri(self, output: Path) -> str:
        """The URI or reference to use for a run whose output folder is `output`.

        Raises:
            UserError: a scheme that MLflow has no store for, or a reference that cannot be resolved.
        """
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output.absolute() / 'mlflow.db'}"
        scheme = resolve(uri).partition(":")[0].partition("+")[0]
        if scheme not in SCHEMES:
            raise UserError(
                f"tracking.uri (or MLFLOW_TRACKING_URI): got {redact_text(uri)!r}, wanted http(s)://HOST, "
                "sqlite:///FILE or another database URL; plain folders are not supported by MLflow any more"
            )
        return uri


@dataclass(frozen=True)
class RunHandle:
    """What a worker needs to log into a run. It travels as JSON and holds no secret that was given as a reference.

    `run_id` is None while no server has answered; the run is then created by whoever reaches the server first, and
    found again by `key`, which is the tag `perceiver.run` of the run.
    """

    uri: str
    experiment: str
    name: str
    key: str
    created_ms: int
    run_id: str | None = None
    experiment_id: str | None = None
    artifact_root: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    system_metrics_interval: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain types for JSON or a Ray configuration."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunHandle":
        """The inverse of `to_json`."""
        return cls(**data)


def spool_folder(output: Path) -> Path:
    """Where the tracking spool of a run lies."""
    return output / "tracking"


def load_handle(output: Path) -> RunHandle | None:
    """The handle of the run that was tracked in this output folder, if any."""
    try:
        return RunHandle.from_json(json.loads((spool_folder(output) / "run.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def prewarm(config: TrackingConfig, output: Path) -> Sidecar | None:
    """Start the helper process, which imports MLflow and, for SQLite, creates the store, while the caller goes on.

    Pass the result to `create_run`. None if tracking is off.
    """
    if not config.enabled:
        return None
    uri = config.store_uri(output)
    sidecar = helper_process(spool_folder(output), uri if resolve(uri).startswith("sqlite:") else "")
    sidecar.start()
    return sidecar


def create_run(
    config: TrackingConfig,
    name: str,
    *,
    output: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    resume: RunHandle | str | None = None,
    prewarmed: Sidecar | None = None,
) -> RunHandle | None:
    """Create the run, or reopen `resume` (a handle, or an MLflow run id). Called once, by the driver.

    As for MLflow itself, `MLFLOW_RUN_ID` names a run to log into, `MLFLOW_RUN_NAME` a new one; `resume` comes first.

    Args:
        config: the recipe's `tracking`.
        name: name of the run, and of the experiment unless configured.
        output: local output folder of the run; the spool and a default store are made in it.
        params: settings, nested or flat; they are flattened and redacted here.
        tags: tags beside the configured ones.
        resume: the run to go on with; its status becomes RUNNING again.
        prewarmed: the result of `prewarm`.

    Returns:
        The handle, also written to the spool folder; None if tracking is off. `run_id` is None if the server did not
        answer within about 10 s and `tracking.required` is false.

    Raises:
        UserError: the store refuses, or does not answer although it is required.
    """
    if not config.enabled:
        return None
    handle = _new_handle(config, name, output, params, {**config.tags, **(tags or {})})
    handle = replace(handle, name=os.environ.get("MLFLOW_RUN_NAME") or name)
    if isinstance(resume, RunHandle):
        handle = replace(handle, name=resume.name, key=resume.key, run_id=resume.run_id, created_ms=resume.created_ms)
    else:
        handle = replace(handle, run_id=resume or os.environ.get("MLFLOW_RUN_ID") or None)
    sidecar = prewarmed or helper_process(spool_folder(output))
    try:
        handle = RunHandle.from_json(_open(sidecar, handle)["handle"])
    except SidecarError as error:
        _say_no_answer(error, config, output)
    finally:
        sidecar.close()
    _save_handle(spool_folder(output), handle)
    return handle


def promise_run(
    config: TrackingConfig,
    name: str,
    *,
    output: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
) -> RunHandle | None:
    """A run that the first tracker opened on it creates, so that nobody waits for MLflow here; arguments as above.

    The run that was promised in this output folder before is returned again. None if tracking is off.
    """
    if not config.enabled:
        return None
    handle = _new_handle(config, name, output, params, {**config.tags, **(tags or {})})
    if before := load_handle(output):
        handle = replace(
            handle,
            key=before.key,
            run_id=before.run_id,
            experiment_id=before.experiment_id,
            created_ms=before.created_ms,
        )
    _save_handle(spool_folder(output), handle)
    return handle


def open_tracker(
    handle: RunHandle | None,
    spool_dir: Path,
    *,
    system_metrics_node: str | None = None,
    owner: bool = True,
    interval_s: float = 2.0,
    close_timeout_s: float = 30.0,
) -> SpoolTracker | NullTracker:
    """A tracker for the run, in the process that logs. Returns at once; MLflow loads in a helper process.

    Args:
        handle: from `create_run`; None gives a `NullTracker`.
        spool_dir: local folder of the spool, best `spool_folder(output)`; what an earlier process left there is sent.
        system_metrics_node: log the load of this machine under this name ("" for a run on one machine); None: do not.
        owner: create the run if the driver could not. True in one process only (rank 0 or the driver).
        interval_s: seconds between two batches.
        close_timeout_s: how long `close` waits for the last events.
    """
    if handle is None:
        return NullTracker()
    sender = SidecarSender(handle, spool_dir, owner=owner)
    tracker = SpoolTracker(spool_dir, sender, interval_s=interval_s, close_timeout_s=close_timeout_s)
    if system_metrics_node is not None and handle.system_metrics_interval:
        system = SystemMetrics(
            tracker, node=system_metrics_node, origin=handle.created_ms / 1e3, interval_s=handle.system_metrics_interval
        )
        tracker.before_close.append(system.close)
    return tracker


def replay(config: TrackingConfig, output: Path, timeout_s: float = 60.0) -> int:
    """Send what the runs in an output folder could not, the last status included; return how many events are left.

    Raises:
        UserError: no run was tracked there.
    """
    handle = load_handle(output)
    if handle is None:
        raise UserError(f"{output}: no tracked run there; give the output folder of a run")
    folder = spool_folder(output)
    sender = SidecarSender(replace(handle, uri=config.store_uri(output)), folder)
    tracker = SpoolTracker(folder, sender, interval_s=0.05, close_timeout_s=5.0, replay_status=True)
    tracker.drain(timeout_s)
    tracker.detach()
    return unsent(folder)


class SidecarSender:
    """Delivers events through a helper process; each call has a deadline."""

    def __init__(self, handle: RunHandle, spool_dir: Path, owner: bool = True) -> None:
        self.handle = handle
        self.spool_dir = spool_dir
        self.owner = owner
        self._sidecar = helper_process(spool_dir, nice=10)
        self._sidecar.start()

    def send(self, events: Sequence[Event]) -> list[tuple[Event, str]]:
        """See `perceiver.tracking.tracker.Sender`."""
        if not events:
            return []
        request = {"op": "send", "handle": self.handle.to_json(), "owner": self.owner, "events": list(events)}
        try:
            _probe(resolve(self.handle.uri))
            self._sidecar.call({"op": "load"}, LOAD_S)
            reply = self._sidecar.call(request, SEND_S + _artifact_seconds(events))
        except SidecarError as error:
            raise SendError(str(error)) from error
        handle = RunHandle.from_json(reply["handle"])
        if handle != self.handle:
            self.handle = handle
            _save_handle(self.spool_dir, handle)
        return [(events[index], reason) for index, reason in reply["rejected"]]

    def close(self) -> None:
        """End the helper process."""
        self._sidecar.close()


def _new_handle(
    config: TrackingConfig, name: str, output: Path, params: Mapping[str, Any], tags: Mapping[str, str]
) -> RunHandle:
    uri = config.store_uri(output)
    plain = resolve(uri)
    root = config.artifact_root
    if root is None and plain.startswith("sqlite:///"):
        root = str(Path(plain.removeprefix("sqlite:///").partition("?")[0]).absolute().parent / "mlartifacts")
    standard = {"mlflow.user": _user(), "mlflow.source.name": "perceiver train", "mlflow.source.type": "LOCAL"}
    return RunHandle(
        uri=uri,
        experiment=config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or name,
        name=name,
        key=uuid.uuid4().hex,
        created_ms=time.time_ns() // 1_000_000,
        artifact_root=root,
        tags={key: str(value) for key, value in redact({**standard, **tags}).items()},
        params={key: str(value) for key, value in redact(flatten(params)).items()},
        system_metrics_interval=config.system_metrics_interval if config.system_metrics else None,
    )


def _say_no_answer(error: SidecarError, config: TrackingConfig, output: Path) -> None:
    """Raise where the run must not start without its store; otherwise say what happens now."""
    place, waiting = redact_text(config.store_uri(output)), spool_folder(output)
    if error.kind == "refused":
        raise UserError(f"MLflow at {place} refuses the run: {error}") from None
    if config.required:
        fix = "start it, or set tracking.required=false"
        raise UserError(f"MLflow at {place} does not answer ({error}); {fix}") from None
    log.warning("MLflow at %s does not answer (%s): training goes on, figures wait in %s", place, error, waiting)


def _open(sidecar: Sidecar, handle: RunHandle) -> Reply:
    """Have the helper create or reopen the run: at most about `SERVER_S` seconds for anything that is not a file."""
    plain = resolve(handle.uri)
    local = plain.startswith("sqlite:")
    _probe(plain)
    sidecar.call({"op": "load"}, LOAD_S)
    return sidecar.call({"op": "open", "handle": handle.to_json()}, LOAD_S if local else SERVER_S)


def _probe(uri: str) -> None:
    """Fail within 5 s if nothing listens at a URL's host and port."""
    parts = urlsplit(uri)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if not parts.hostname or port is None:
        return
    try:
        socket.create_connection((parts.hostname, port), timeout=SERVER_S / 2).close()
    except OSError as error:
        raise SidecarError(f"{parts.hostname}:{port}: {error.strerror or error}") from error


def _save_handle(folder: Path, handle: RunHandle) -> None:
    """Write `run.json`. A password in the URI is masked: who reads the file has the configuration for it."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"run.json.{os.getpid()}"
    partial.write_text(json.dumps({**handle.to_json(), "uri": redact_text(handle.uri)}, indent=1))
    partial.replace(folder / "run.json")


def _artifact_seconds(events: Sequence[Event]) -> float:
    """Time to allow for uploading the artifacts among the events."""
    paths = [Path(event["path"]) for event in events if event["kind"] == "artifact"]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files) / ARTIFACT_BYTES_PER_S


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
