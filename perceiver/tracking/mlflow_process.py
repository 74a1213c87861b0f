"""The MLflow process, as the process that trains sees it.

Importing MLflow takes seconds and 230 MB, its retries block, and it prints to the terminal: all that happens in a
process of its own, which runs `perceiver.tracking.mlflow_writer` and ends when its parent does.
"""

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "False",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
REVIVE_S = 30.0
Request = Mapping[str, Any]


class MlflowProcess:
    """Sends the record of one run while it trains.

    Args:
        request: arguments of `perceiver.tracking.mlflow_writer.follow`.
        log: file for the messages of the process.
    """

    def __init__(self, request: Request, log: Path) -> None:
        self.request, self.log = request, log
        self._process: subprocess.Popen[bytes] | None = None
        self._started = -math.inf
        self.revive()

    def revive(self) -> None:
        """Start the process if it does not run, at most every `REVIVE_S` seconds."""
        if (self._process is None or self._process.poll() is not None) and time.monotonic() - self._started > REVIVE_S:
            self._start()

    def finish(self, timeout_s: float) -> None:
        """Have the rest sent, and end the process; kill it after `timeout_s` seconds."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _start(self) -> None:
        self._started = time.monotonic()
        try:
            self._process = _popen(self.log, stdout=subprocess.DEVNULL)
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(self.request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            log.warning("the MLflow process cannot be started (%s); the record waits", error)


def ask(request: Request, log: Path, timeout_s: float) -> dict[str, Any]:
    """Return the answer of a process that is started for one request; `{"error": reason}` if there is none in time."""
    process = _popen(log, stdout=subprocess.PIPE)
    try:
        answer, _ = process.communicate(json.dumps(request).encode() + b"\n", timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": "no answer in time"}
    return json.loads(answer) if answer else {"error": f"the MLflow process ended, see {log}"}


def _popen(log: Path, stdout: int) -> "subprocess.Popen[bytes]":
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with log.open("ab") as file:
        return subprocess.Popen(
            # -P: a folder `perceiver` where the user happens to be is not the package.
            [sys.executable, "-P", "-m", "perceiver.tracking.mlflow_writer"],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=file,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
