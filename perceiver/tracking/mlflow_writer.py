"""Sends the record of a run to MLflow. Runs in a separate process.

At the start and after each failure the writer reads what MLflow has, and sends what is missing, no point twice:

- MLflow cannot replace a point. If a step ran twice, because the run resumed from an earlier checkpoint, the first
  point stays: per key, only steps above MLflow's last one are sent.
- Rows out of order in the record (a late evaluation) are always sent. MLflow's stores keep one point per key, step,
  time and value, so sending a row twice is harmless.
- Tags, artifacts and states are sent again if it is not certain that they arrived, which is harmless, too.
"""

import fcntl
import functools
import json
import logging
import math
import os
import posixpath
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from perceiver.storage import write_whole
from perceiver.tracking.code import TAGS
from perceiver.tracking.mlflow_links import (
    TAG_CHARACTERS,
    alias_best,
    import_mlflow,
    line,
    link_checkpoint,
    log_datasets,
    unless,
)
from perceiver.tracking.record import FILES, LOG, NOTES, SENT, SYSTEM, LineWriter, Row, read_rows, read_sent
from perceiver.tracking.redaction import redact_text, resolve, server_address
from perceiver.tracking.runs import KEY_TAG, SERVER_S, RunHandle, save_handle
from perceiver.tracking.system_metrics import record_load

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from mlflow.exceptions import MlflowException

log = logging.getLogger("perceiver.tracking")

INTERVAL_S = 2.0
BACKOFF_S = (1.0, 60.0)
DOWN_S = 5.0
SEND_S, UPLOAD_S = 60.0, 1800.0
METRICS_PER_BATCH, TEXTS_PER_BATCH = 1000, 100
KEY_CHARACTERS, PARAM_CHARACTERS = 250, 6000
STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the page for training, not for agents
REFUSED = ("INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_STATE")


class RefusedError(Exception):
    """MLflow refuses a request permanently."""


def make_client(uri: str) -> "MlflowClient":
    """Return a client of the store at a URI or reference.

    Raises:
        OSError: nothing listens there; within 5 s.
    """
    plain = resolve(uri)
    host, port = server_address(plain, "tracking.uri")
    if host and port:
        socket.create_connection((host, port), timeout=DOWN_S).close()
    return import_mlflow().MlflowClient(tracking_uri=plain, registry_uri=plain)


@functools.cache
def clean_key(key: str) -> str:
    """Return a metric, parameter or tag key that MLflow accepts: other characters become `_`, paths are normalized."""
    key = re.sub(r"[^\w\-. :/]", "_", key)
    return posixpath.normpath("/" + key).lstrip("/")[:KEY_CHARACTERS].rstrip("/") or "_"


def open_run(client: "MlflowClient", handle: RunHandle) -> tuple[RunHandle, "Run"]:
    """Find the run of a handle by id or key, or create it with its tags; log its parameters.

    Returns:
        The handle, completed from MLflow, and the run.
    """
    run = None
    if handle.run_id:
        with unless("RESOURCE_DOES_NOT_EXIST"):
            run = client.get_run(handle.run_id)
    if run is None or run.info.lifecycle_stage != "active":
        experiment_id, by_key = _experiment(client, handle), f"tags.`{KEY_TAG}` = '{handle.key}'"
        run = next(iter(client.search_runs([experiment_id], by_key, max_results=1)), None)
    else:
        experiment_id = run.info.experiment_id
    if run is None:
        tags = {**handle.tags, KEY_TAG: handle.key, **({"resumed_from": handle.run_id} if handle.run_id else {})}
        clean = {clean_key(key): value[:TAG_CHARACTERS] for key, value in tags.items()}
        run = client.create_run(experiment_id, handle.created_ms or None, clean, handle.name)
    else:
        experiment = client.get_experiment(experiment_id).name
        handle = replace(handle, key=run.data.tags.get(KEY_TAG, handle.key), experiment=experiment)
        _renew_code_tags(client, run, handle)
    _log_params(client, run, handle.params)
    log_datasets(client, run, handle)
    created_ms = handle.created_ms or run.info.start_time
    return replace(handle, run_id=run.info.run_id, experiment_id=experiment_id, created_ms=created_ms), run


def _renew_code_tags(client: "MlflowClient", run: "Run", handle: RunHandle) -> None:
    """Set the tags of the code to those of this start; not in a run of another program (MLFLOW_RUN_ID)."""
    for key in TAGS.values():
        if KEY_TAG in run.data.tags and handle.tags.get(key, run.data.tags.get(key)) != run.data.tags.get(key):
            client.set_tag(run.info.run_id, key, handle.tags[key])


def _experiment(client: "MlflowClient", handle: RunHandle) -> str:
    """Return the experiment's id; create it if it is missing."""
    root, file = handle.artifact_root, _sqlite_file(handle.uri)
    if root is None and file is not None:
        root = (file.absolute().parent / "mlartifacts").as_uri()
    experiment = client.get_experiment_by_name(handle.experiment)
    if experiment is None:
        with unless("RESOURCE_ALREADY_EXISTS"):  # another run created it first
            client.create_experiment(handle.experiment, root, tags=EXPERIMENT_TAGS)
        experiment = client.get_experiment_by_name(handle.experiment)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise RefusedError(
            f"experiment {handle.experiment!r} is deleted; restore it or set tracking.experiment to another"
        )
    return experiment.experiment_id


def _sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite store; None for another store."""
    from sqlalchemy.engine import make_url

    url = make_url(plain) if (plain := resolve(uri)).startswith("sqlite:") else None
    return Path(url.database) if url and url.database else None


def _log_params(client: "MlflowClient", run: "Run", params: dict[str, str]) -> None:
    """Log parameters. MLflow cannot change one: a new value of a resumed run becomes the tag `param.<key>`."""
    from mlflow.entities import Param

    wanted = {clean_key(key): value[:PARAM_CHARACTERS] for key, value in params.items()}
    there, run_id = run.data.params, run.info.run_id
    new = [Param(key, value) for key, value in wanted.items() if key not in there]
    for start in range(0, len(new), TEXTS_PER_BATCH):
        client.log_batch(run_id, params=new[start : start + TEXTS_PER_BATCH])
    for key, value in wanted.items():
        tag = clean_key(f"param.{key}")
        if run.data.tags.get(tag, there.get(key, value)) != value:  # also one that has its first value again
            client.set_tag(run_id, tag, value)


class RunWriter:
    """Sends the record in a run's folder to its MLflow run, which is created if it does not exist yet."""

    def __init__(self, folder: Path, handle: RunHandle) -> None:
        self.folder, self.handle = folder, handle
        self._client: MlflowClient | None = None
        self._offsets: dict[str, int] = {}
        self._there: dict[str, int] = {}
        self._highest: dict[str, int] = {}

    def send(self) -> None:
        """Send everything that is recorded and not sent yet.

        Raises:
            Exception: an error of MLflow, its store or the network; the next call tries again.
        """
        try:
            client = self._client or self._connect()
            for name in FILES:
                rows, end = read_rows(self.folder / name, self._offsets[name])
                while end > self._offsets[name]:
                    (self._notes if name == NOTES else self._metrics)(client, rows)
                    self._offsets[name] = end
                    write_whole(self.folder / SENT, json.dumps({"run_id": self.handle.run_id, **self._offsets}))
                    rows, end = read_rows(self.folder / name, end)
        except Exception:
            self._client = None
            raise

    def _connect(self) -> "MlflowClient":
        """Find or create the run, read the last step of each metric, and restart at the beginning of the record."""
        if self.handle.run_id and (file := _sqlite_file(self.handle.uri)) and not file.exists():
            raise OSError(f"{file} does not exist on this machine: use a server or a shared folder")
        with _deadline(SEND_S):
            client = make_client(self.handle.uri)
            handle, run = open_run(client, self.handle)
        if handle != self.handle:
            self.handle = handle
            save_handle(self.folder, handle)
        # An older point was logged by another program into the run of MLFLOW_RUN_ID.
        own = [metric for metric in run.data.to_proto().metrics if metric.timestamp >= handle.created_ms]
        self._there, self._highest = {metric.key: metric.step for metric in own}, {}
        sent = read_sent(self.folder)
        self._offsets = dict.fromkeys(FILES, 0)
        if sent.get("run_id") == handle.run_id:
            self._offsets[NOTES] = sent[NOTES]
        self._client = client
        return client

    def _metrics(self, client: "MlflowClient", rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        for row in rows:
            step, time_ms = int(row.pop("step")), round(1000 * row.pop("time"))
            for key, value in row.items():
                key = clean_key(key)
                if step > self._there.get(key, -math.inf) or step <= self._highest.get(key, -math.inf):
                    metrics.append(Metric(key, float(value), time_ms, step))
                self._highest[key] = max(step, self._highest.get(key, step))
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            self._log_batch(client, metrics[start : start + METRICS_PER_BATCH])

    def _log_batch(self, client: "MlflowClient", metrics: "list[Metric]") -> None:
        """Log a batch; if MLflow refuses it, log its halves, so that only the bad point is lost."""
        mlflow = import_mlflow()
        assert self.handle.run_id is not None
        try:
            with _deadline(SEND_S):
                client.log_batch(self.handle.run_id, metrics=metrics)
        except mlflow.exceptions.MlflowException as error:
            if not self._refuses(client, error):
                raise
            if len(metrics) == 1:
                log.error("MLflow refuses %s of step %d (%s)", metrics[0].key, metrics[0].step, line(error))
            else:
                half = len(metrics) // 2
                self._log_batch(client, metrics[:half])
                self._log_batch(client, metrics[half:])

    def _notes(self, client: "MlflowClient", notes: Sequence[Row]) -> None:
        mlflow = import_mlflow()
        for note in notes:
            try:
                with _deadline(UPLOAD_S if "artifact" in note else SEND_S):
                    self._send_note(client, note)
            except (mlflow.exceptions.MlflowException, FileNotFoundError) as error:
                if not isinstance(error, FileNotFoundError) and not self._refuses(client, error):
                    raise
                log.error("MLflow refuses %s (%s)", note, line(error))

    def _send_note(self, client: "MlflowClient", note: Row) -> None:
        run_id = self.handle.run_id
        assert run_id is not None
        match note:
            case {"tag": key, "value": value}:
                client.set_tag(run_id, clean_key(key), value[:TAG_CHARACTERS])
                if key == "checkpoint_uri":
                    link_checkpoint(client, self.handle, value)
                if key == "best_checkpoint_uri":
                    alias_best(client, self.handle, value)
            case {"artifact": path, "folder": folder} if Path(path).is_dir():
                client.log_artifacts(run_id, path, folder or None)
            case {"artifact": path, "folder": folder}:
                if not Path(path).exists():
                    raise FileNotFoundError(f"{path} does not exist")
                client.log_artifact(run_id, path, folder or None)
            case {"status": "running"}:
                client.update_run(run_id, STATUS["running"])
            case {"status": status, "time": when}:
                client.set_terminated(run_id, STATUS[status], round(1000 * when))

    def _refuses(self, client: "MlflowClient", error: "MlflowException") -> bool:
        """Return whether MLflow refuses a point permanently; a deleted run gets the same error for every request."""
        assert self.handle.run_id is not None
        if error.error_code != "INVALID_PARAMETER_VALUE":
            return False
        return client.get_run(self.handle.run_id).info.lifecycle_stage == "active"


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Exit if the body takes longer: a hanging request cannot be interrupted. The parent restarts the process."""

    def end() -> None:
        log.error("MLflow did not answer within %.0f s: exiting", seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Wait until no other process sends this record, so that two do not create the run at once."""
    lock = os.open(Path(folder, LOG), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def follow(folder: str, handle: dict[str, Any], node: str | None, close_s: float) -> None:
    """Send a record until the parent closes standard input or exits, then send the rest.

    Args:
        folder: the run's folder on a local disk.
        handle: the run, as JSON.
        node: name under which the load of this machine is recorded; None: not recorded.
        close_s: seconds to send the rest; 5 at most if MLflow is known to be down.
    """
    os.nice(10)  # training has priority
    run, load = RunHandle.from_json(handle), None
    ended, failing = threading.Event(), threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended, failing, close_s), daemon=True).start()
    if node is not None and run.system_metrics_interval:
        rows, origin = LineWriter(Path(folder, SYSTEM)), run.created_ms / 1000 or time.time()
        arguments = (rows, node, origin, run.system_metrics_interval, ended)
        load = threading.Thread(target=record_load, args=arguments, daemon=True)
        load.start()
    writer, failures, down, left_at = RunWriter(Path(folder), run), 0, True, math.inf
    while True:
        last = ended.is_set()
        if last and left_at == math.inf:
            left_at = time.monotonic()
            if load is not None:
                load.join()
        try:
            with _alone(folder):
                writer.send()
            if failures:
                log.warning("MLflow answers again after %d failed attempts", failures)
            failures, down = 0, False
            failing.clear()
        except Exception as error:  # noqa: BLE001 - MLflow, its store or the network: try again later
            if failures == 0:
                log.warning("MLflow does not answer (%s); the record is kept in %s", line(error), folder)
            failures, down = failures + 1, down or not last
            failing.set()
        if last and (not failures or time.monotonic() - left_at > (min(DOWN_S, close_s) if down else close_s)):
            return
        first, longest = BACKOFF_S
        pause = min(longest, first * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1.5)
        ended.wait(pause if failures else INTERVAL_S) if not last else time.sleep(0.5)


def _wait_for_end(ended: threading.Event, failing: threading.Event, close_s: float) -> None:
    """Wait for the end of standard input; exit afterwards even if a request hangs."""
    sys.stdin.buffer.read()
    ended.set()
    time.sleep(DOWN_S + (0.0 if failing.is_set() else close_s))
    os._exit(1)


def answer(handle: RunHandle) -> dict[str, Any]:
    """Create or reopen the run of a handle; return `{"handle": ...}`, `{"refused": reason}` or `{"error": reason}`."""
    try:
        with _deadline(SEND_S if _sqlite_file(handle.uri) else SERVER_S):
            client = make_client(handle.uri)
            handle, run = open_run(client, handle)
            client.update_run(run.info.run_id, STATUS["running"])
        return {"handle": handle.to_json()}
    except Exception as error:  # noqa: BLE001 - whatever fails must become an answer
        refused = isinstance(error, RefusedError) or getattr(error, "error_code", "") in REFUSED
        return {"refused" if refused else "error": line(error)}


class _Redacted:
    """A text stream that masks secrets before they reach the log."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(redact_text(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def main() -> None:
    """Serve the request on standard input (see `perceiver.tracking.mlflow_process`)."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log: MLflow prints a run's address, with its login
    sys.stdout = sys.stderr = _Redacted(sys.stderr)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    request = json.loads(sys.stdin.buffer.readline())
    import_mlflow()
    if "folder" in request:
        follow(**request)
    else:
        print(json.dumps(answer(RunHandle.from_json(request["handle"]))), file=answers, flush=True)


if __name__ == "__main__":
    main()
