"""What training code may tell about a run: the interface, one that does nothing, and one that writes the run's record.

Nothing here can stop or slow a training run: each call appends one line to a local file.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from perceiver.tracking.mlflow_process import MlflowProcess
from perceiver.tracking.record import HISTORY, LOG, NOTES, LineWriter, unsent
from perceiver.tracking.redaction import redact_value

log = logging.getLogger(__name__)

Status = Literal["running", "finished", "failed", "stopped"]


class Tracker(Protocol):
    """What training code may tell about a run. No method raises because of the disk or the server."""

    def log_metrics(self, step: int, metrics: Mapping[str, float], time_s: float | None = None) -> None:
        """Record metrics at an optimizer step, as of `time_s` seconds since the epoch (default: now)."""

    def set_tag(self, key: str, value: str) -> None:
        """Set or replace a tag of the run. Secrets are redacted."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file or folder to `folder` of the run's artifacts. It must stay in place until it has been sent."""

    def close(self, status: Status) -> None:
        """Record how the run ended, wait for what is still to be sent, and stop. Later calls do nothing."""

    def detach(self) -> None:
        """Do what `close` does, but leave the run's status to another process."""


class NullTracker(Tracker):
    """Tracks nothing."""


class RecordTracker:
    """Writes the record of a run (`perceiver.tracking.record`), which an MLflow process follows and sends.

    Args:
        folder: the run's folder on a local disk.
        handle: the run, as JSON (`perceiver.tracking.runs.RunHandle.to_json`).
        history, node, close_timeout_s: see `perceiver.tracking.runs.open_tracker`.
    """

    def __init__(
        self, folder: Path, handle: Mapping[str, Any], history: str | None, node: str | None, close_timeout_s: float
    ) -> None:
        self.folder, self.close_timeout_s = folder, close_timeout_s
        self._history, self._notes = LineWriter(folder / HISTORY, history), LineWriter(folder / NOTES)
        request = {"folder": str(folder), "handle": handle, "node": node, "close_s": close_timeout_s}
        self._process = MlflowProcess(request, folder / LOG)
        self._closed = False

    def log_metrics(self, step: int, metrics: Mapping[str, float], time_s: float | None = None) -> None:
        """See `Tracker`."""
        if not self._closed:
            now = time.time() if time_s is None else time_s
            self._history.append({"step": int(step), "time": now, **{key: float(metrics[key]) for key in metrics}})
            self._process.revive()

    def set_tag(self, key: str, value: str) -> None:
        """See `Tracker`."""
        self._note(tag=key, value=str(redact_value(key, str(value))))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """See `Tracker`."""
        self._note(artifact=str(Path(path).absolute()), folder=folder)

    def close(self, status: Status) -> None:
        """See `Tracker`. What cannot be sent is sent by the next tracker of this folder."""
        self._note(status=status)
        self.detach()

    def detach(self) -> None:
        """See `Tracker`."""
        if self._closed:
            return
        self._closed = True
        self._history.close()
        self._notes.close()
        self._process.finish(self.close_timeout_s)
        if left := unsent(self.folder):
            log.warning("MLflow lacks %d lines of the record in %s, see %s there", left, self.folder, LOG)

    def _note(self, **note: str) -> None:
        if not self._closed:
            self._notes.append({"time": time.time(), **note})
