"""Tracking a run: the protocol the training code sees, a tracker that does nothing, and one that spools to disk.

Nothing here knows MLflow (see `perceiver.tracking.runs`), and nothing here can stop or slow a training run: an event is
one appended line; a daemon thread hands the lines to a `Sender` and, when that fails, tries again later.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from perceiver.tracking.redaction import redact, redact_value
from perceiver.tracking.spool import Event, SpoolReader, SpoolWriter, encode_number, unsent

log = logging.getLogger(__name__)

DOWN_CLOSE_S = 5.0

Status = Literal["finished", "failed", "stopped"]


class Tracker(Protocol):
    """What training code may tell about a run. No method raises because of the place the news go to."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record numbers at an optimizer step; NaN and infinities are allowed."""
        ...

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings (flat, dotted keys). Secrets are redacted."""
        ...

    def set_tag(self, key: str, value: str) -> None:
        """Attach or replace one text. Secrets are redacted."""
        ...

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file or folder to `folder` of the run's artifacts. It must stay where it is until it was sent."""
        ...

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything so far has arrived; False if it has not within `timeout_s` seconds."""
        ...

    def close(self, status: Status) -> None:
        """Record how the run ended, and stop. Nothing may be logged afterwards."""
        ...

    def detach(self) -> None:
        """Stop as `close` does, but leave the run's status to another process."""
        ...


class NullTracker:
    """Tracks nothing."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Do nothing."""

    def set_tag(self, key: str, value: str) -> None:
        """Do nothing."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def flush(self, timeout_s: float) -> bool:
        """Do nothing; nothing is ever unsent."""
        return True

    def close(self, status: Status) -> None:
        """Do nothing."""

    def detach(self) -> None:
        """Do nothing."""


class SendError(Exception):
    """The receiver cannot be reached or is not able to take events now: try again later."""


class Sender(Protocol):
    """Takes events to where they belong. A batch may arrive again, in whole or in part, after a crash or a failure in
    its middle, so taking an event twice must have the effect of taking it once."""

    def send(self, events: Sequence[Event]) -> list[tuple[Event, str]]:
        """Deliver in order; return those that are refused for good, with the reason.

        Raises:
            SendError: not now; the whole batch will come again.
        """
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class SpoolTracker:
    """Spools events to `folder` and sends them from a daemon thread.

    A tracker that is opened on a folder first sends what earlier processes left there.

    Args:
        folder: spool folder, on a disk that outlives the process.
        sender: where the events go.
        interval_s: pause between two batches, so that batches are large.
        backoff_s: first and longest pause after a failure; doubled each time, with jitter of ±50 %.
        close_timeout_s: how long `close` waits for the last events (5 s at most if the receiver is known to be down).
        replay_status: also send how an earlier process said that the run ended. Off where this process goes on with the
            run, and decides that itself.

    Attributes:
        before_close: called at the beginning of `close` and `detach`, to end what logs into this tracker.
    """

    def __init__(
        self,
        folder: Path,
        sender: Sender,
        *,
        interval_s: float = 2.0,
        backoff_s: tuple[float, float] = (1.0, 60.0),
        close_timeout_s: float = 30.0,
        replay_status: bool = False,
    ) -> None:
        self.folder = folder
        self.sender = sender
        self.interval_s = interval_s
        self.backoff_s = backoff_s
        self.close_timeout_s = close_timeout_s
        self.replay_status = replay_status
        self.before_close: list[Callable[[], None]] = []
        self._writer = SpoolWriter(folder)
        self._reader = SpoolReader(folder, self._writer)
        self._state = threading.Condition()
        self._sent = 0
        self._hurry = 0
        self._closed = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        values = {key: encode_number(float(value)) for key, value in metrics.items()}
        self._append({"kind": "metrics", "step": int(step), "values": values})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._append({"kind": "params", "values": {key: str(value) for key, value in redact(params).items()}})

    def set_tag(self, key: str, value: str) -> None:
        """See `Tracker`."""
        self._append({"kind": "tag", "key": key, "value": str(redact_value(key, str(value)))})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """See `Tracker`."""
        self._append({"kind": "artifact", "path": str(Path(path).absolute()), "folder": folder})

    def flush(self, timeout_s: float) -> bool:
        """See `Tracker`. Tries at once, without the pause between batches or after a failure."""
        deadline = time.monotonic() + timeout_s
        with self._state:
            target = self._writer.total
            self._hurry += 1
            self._state.notify_all()
            try:
                while self._sent + self._writer.dropped < target:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._thread.is_alive():
                        return False
                    self._state.wait(left)
            finally:
                self._hurry -= 1
        return True

    def close(self, status: Status) -> None:
        """See `Tracker`. Waits up to `close_timeout_s`; what is left then stays in the folder for the next tracker."""
        self._finish(status)

    def drain(self, timeout_s: float) -> bool:
        """Wait until also what earlier processes left has arrived; False if it has not within `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while unsent(self.folder):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def detach(self) -> None:
        """Stop as `close` does, but leave the run's status to another process."""
        self._finish(None)

    def _finish(self, status: Status | None) -> None:
        if self._closed:
            return
        for stop in self.before_close:
            stop()
        if status is not None:
            self._append({"kind": "status", "value": status})
        self.flush(min(self.close_timeout_s, DOWN_CLOSE_S) if self._failures else self.close_timeout_s)
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._thread.join(timeout=1.0)
        self.sender.close()
        self._thread.join(timeout=1.0)
        if self._thread.is_alive():
            return
        self._writer.close()
        self._reader.close()
        if left := unsent(self.folder) + len(self._writer.pending):
            log.warning("%d tracking events are not sent yet; the next run with %s sends them", left, self.folder)

    def _append(self, event: Event) -> None:
        event = {"time": time.time_ns() // 1_000_000, **event}
        with self._state:
            if not self._closed:
                self._writer.append(event)

    def _run(self) -> None:
        while True:
            with self._state:
                if self._closed:
                    return
                self._writer.write_pending()
            try:
                more = self._deliver_next()
            except (SendError, OSError) as error:
                self._pause(self._backoff(error))
            else:
                self._recovered()
                self._pause(0.0 if more else self.interval_s)

    def _deliver_next(self) -> bool:
        """Send and commit one chunk; True if more is known to wait."""
        chunk = self._reader.read()
        if chunk is None:
            return False
        own = self._reader.is_own(chunk.segment)
        keep_status = own or self.replay_status
        events = [event for event in chunk.events if keep_status or event.get("kind") != "status"]
        for event, reason in self.sender.send(events):
            log.warning("tracking refused an event (%s); it is kept in %s", reason, self.folder / "rejected.jsonl")
            self._reader.reject(event, reason)
        self._reader.commit(chunk)
        with self._state:
            self._sent += len(chunk.events) if own else 0
            self._state.notify_all()
        return chunk.more or not own

    def _backoff(self, error: Exception) -> float:
        if self._failures == 0:
            log.warning("tracking is down (%s); training goes on, events wait in %s", error, self.folder)
        first, longest = self.backoff_s
        pause = min(longest, first * 2.0 ** min(self._failures, 30)) * random.uniform(0.5, 1.5)
        self._failures += 1
        return pause

    def _recovered(self) -> None:
        if self._failures:
            log.warning("tracking is back after %d failed attempts", self._failures)
            self._failures = 0

    def _pause(self, seconds: float) -> None:
        """Sleep; shortly while somebody waits in `flush` or `close`, who also end a sleep that has begun."""
        with self._state:
            if not self._hurry:
                self._state.wait_for(lambda: self._closed or self._hurry > 0, timeout=seconds)
            else:
                longest = self.backoff_s[0] if self._failures else 0.05
                self._state.wait_for(lambda: self._closed, timeout=min(seconds, longest))
