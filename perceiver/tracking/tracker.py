"""Trackers: the interface, one that does nothing, and one that writes the record of a run.

A tracker cannot stop or slow training: each call appends one line to a local file.
"""

import logging
import math
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from perceiver.tracking.mlflow_process import MLFLOW, TENSORBOARD, WANDB_WRITER, start
from perceiver.tracking.record import HISTORY, LOG, NOTES, TENSORBOARD_LOG, WANDB_LOG, LineWriter, unsent
from perceiver.tracking.redaction import redact_value

log = logging.getLogger(__name__)

REVIVE_S = 30.0
Status = Literal["running", "finished", "failed", "stopped"]


class Tracker(Protocol):
    """Interface through which training code logs. No method raises because of the disk or the server."""

    def log_metrics(self, step: int, metrics: Mapping[str, float], time_s: float | None = None) -> None:
        """Record metrics at an optimizer step, as of `time_s` seconds since the epoch (default: now)."""

    def set_tag(self, key: str, value: str) -> None:
        """Set or replace a tag of the run. Secrets are redacted."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file or folder to `folder` of the run's artifacts. It must stay in place until it has been sent."""

    def close(self, status: Status) -> None:
        """Record the final status, wait until everything is sent, and stop. Later calls do nothing."""

    def detach(self) -> None:
        """Like `close`, but another process records the final status."""


class NullTracker(Tracker):
    """Tracks nothing."""


class Follower:
    """A process that follows the record of a run (see `perceiver.tracking.mlflow_process.start`)."""

    def __init__(self, module: str, request: Mapping[str, Any], log: Path) -> None:
        self.module, self.request, self.log = module, request, log
        self._process: subprocess.Popen[bytes] | None = None
        self._started = -math.inf
        self.revive(0.0)

    def revive(self, pause_s: float) -> None:
        """Start the process if it is not running and was last started more than `pause_s` seconds ago."""
        now = time.monotonic()
        if (self._process is None or self._process.poll() is not None) and now - self._started > pause_s:
            self._started = now
            try:
                self._process = start(self.request, self.log, self.module)
            except OSError as error:
                log.warning("%s cannot be started (%s); the record is kept", self.module, error)

    def close(self, timeout_s: float) -> None:
        """Wait until the process has sent the rest."""
        self.revive(0.0)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class RecordTracker:
    """Writes the record of a run (`perceiver.tracking.record`), which other processes follow.

    Args:
        folder: the run's folder on a local disk.
        handle: the MLflow run, as JSON (`perceiver.tracking.runs.RunHandle.to_json`); None without MLflow.
        history, node, close_timeout_s, tensorboard, wandb: see `perceiver.tracking.runs.open_tracker`.
    """

    def __init__(
        self,
        folder: Path,
        handle: Mapping[str, Any] | None,
        history: str | None,
        node: str | None,
        close_timeout_s: float,
        tensorboard: bool = False,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.close_timeout_s = folder, close_timeout_s
        self._history, self._notes = LineWriter(folder / HISTORY, history), LineWriter(folder / NOTES)
        self._closed, self._on_mlflow = False, handle is not None
        self._followers: list[Follower] = []
        if handle is not None:
            request = {"folder": str(folder), "handle": handle, "node": node, "close_s": close_timeout_s}
            self._followers.append(Follower(MLFLOW, request, folder / LOG))
        if tensorboard:
            self._followers.append(Follower(TENSORBOARD, {"folder": str(folder)}, folder / TENSORBOARD_LOG))
        if wandb is not None:
            self._followers.append(Follower(WANDB_WRITER, wandb, folder / WANDB_LOG))

    def log_metrics(self, step: int, metrics: Mapping[str, float], time_s: float | None = None) -> None:
        """See `Tracker`."""
        if not self._closed:
            now = time.time() if time_s is None else time_s
            self._history.append({"step": int(step), "time": now, **{key: float(metrics[key]) for key in metrics}})
            for follower in self._followers:
                follower.revive(REVIVE_S)

    def set_tag(self, key: str, value: str) -> None:
        """See `Tracker`."""
        self._note(tag=key, value=str(redact_value(key, str(value))))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """See `Tracker`."""
        self._note(artifact=str(Path(path).absolute()), folder=folder)

    def close(self, status: Status) -> None:
        """See `Tracker`. The next tracker of this folder sends what is left."""
        self._note(status=status)
        self.detach()

    def detach(self) -> None:
        """See `Tracker`."""
        if self._closed:
            return
        self._closed = True
        self._history.close()
        self._notes.close()
        for follower in self._followers:
            follower.close(self.close_timeout_s)
        if self._on_mlflow and (left := unsent(self.folder)):
            log.warning("MLflow lacks %d lines of the record in %s, see %s there", left, self.folder, LOG)

    def _note(self, **note: str) -> None:
        if not self._closed:
            self._notes.append({"time": time.time(), **note})
