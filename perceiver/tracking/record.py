"""The record of a run on a local disk: files of JSON lines that one process appends to and another sends to MLflow.

history.jsonl           metrics: {"step": 20, "time": 1764547200.5, "train/loss": 0.31, ...}
tracking/system.jsonl   load of the machine, in the same form
tracking/notes.jsonl    tags, artifacts and states: {"time": 1764547203.1, "tag": "checkpoint_uri", "value": "..."}
tracking/sent.json      the MLflow run, and the bytes of each file that it has
tracking/run.json       the MLflow run (`perceiver.tracking.runs.RunHandle`)
tracking/mlflow.log     messages of the MLflow process
tracking/tensorboard.log    messages of the process that writes TensorBoard's event files
tracking/wandb.json     the W&B run, and the last step that it has of each metric
tracking/wandb.log      messages of the process that sends to W&B
"""

import contextlib
import errno
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perceiver.storage import check_own_file

log = logging.getLogger(__name__)

Row = dict[str, Any]

RECORD = "tracking"
"""The folder of what the MLflow process needs."""
HISTORY, SYSTEM, NOTES = FILES = ("history.jsonl", "tracking/system.jsonl", "tracking/notes.jsonl")
SENT, RUN, LOG = "tracking/sent.json", "tracking/run.json", "tracking/mlflow.log"
TENSORBOARD_LOG = "tracking/tensorboard.log"
WANDB, WANDB_LOG = "tracking/wandb.json", "tracking/wandb.log"
READ_BYTES = 2**20


class LineWriter:
    """Appends rows to a file as lines, each handed to the operating system on return. Thread-safe.

    Write errors are not raised: the lines stay in memory and are written with the next row.

    Args:
        path: the file; it is appended to.
        replacement: lines that replace the content of the file.
    """

    def __init__(self, path: Path, replacement: str | None = None) -> None:
        self.path = path
        check_own_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if replacement is not None:
            path.unlink(missing_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._lock = threading.Lock()
        self._failing = False
        size = os.fstat(self._fd).st_size
        # The next row must not be appended to a line that a crash truncated.
        torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        self._pending = b"\n" if torn else (replacement or "").encode()
        self._write()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row."""
        with self._lock:
            self._pending += json.dumps(row).encode() + b"\n"
            self._write()

    def close(self) -> None:
        """Write the lines in memory, and close the file."""
        with self._lock:
            self._write()
            if self._pending:
                log.error("%s: %d lines could not be written and are lost", self.path, self._pending.count(b"\n"))
            os.close(self._fd)

    def _write(self) -> None:
        end = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, self._pending) < len(self._pending):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._pending, self._failing = b"", False
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, end)
            if not self._failing:
                log.warning("%s cannot be written (%s); its lines stay in memory", self.path, error.strerror)
            self._failing = True


def read_rows(path: Path, offset: int) -> tuple[list[Row], int]:
    """Return the rows of a file's complete lines from byte `offset` on, and the offset after them.

    Reads about 1 MiB at most. A line that is not a JSON object is skipped with a warning.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            lines = file.readlines(READ_BYTES)
    except FileNotFoundError:
        return [], offset
    rows = []
    for line in lines:
        if line.endswith(b"\n"):
            offset += len(line)
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                log.warning("%s: skipped a line that is not a JSON object: %.80r", path, line)
    return rows, offset


def read_sent(folder: Path) -> dict[str, Any]:
    """Return the content of `sent.json` in a run's folder; empty if nothing has been sent."""
    try:
        return dict(json.loads((folder / SENT).read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def unsent(folder: Path) -> int:
    """Return the number of lines of a run's record that MLflow lacks."""
    sent, count = read_sent(folder), 0
    for name in FILES:
        with contextlib.suppress(FileNotFoundError), (folder / name).open("rb") as file:
            file.seek(sent.get(name, 0))
            count += sum(line.endswith(b"\n") for line in file)
    return count
