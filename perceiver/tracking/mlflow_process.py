"""Starts the processes that follow a record, from the process that trains.

Importing MLflow takes seconds and 230 MB, its retries block, and it prints to the terminal. So it runs in a separate
process (`perceiver.tracking.mlflow_writer`), which sends the rest and exits after its parent. TensorBoard's event files
are written by another (`perceiver.tracking.tensorboard_writer`), so that a full or slow disk cannot block training, and
W&B gets its copy from a third (`perceiver.tracking.wandb_writer`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "False",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}

Request = Mapping[str, Any]


MLFLOW, TENSORBOARD = "perceiver.tracking.mlflow_writer", "perceiver.tracking.tensorboard_writer"
WANDB_WRITER = "perceiver.tracking.wandb_writer"
"""The modules that follow a record."""


def start(request: Request, log: Path, module: str = MLFLOW) -> "subprocess.Popen[bytes]":
    """Start a process that follows a record until its standard input is closed.

    Args:
        request: arguments of `perceiver.tracking.mlflow_writer.follow`, or what the module's `main` reads.
        log: file for the messages of the process.
        module: what the process runs.
    """
    process = _popen(log, subprocess.DEVNULL, module)
    assert process.stdin is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    return process


def ask(request: Request, log: Path, timeout_s: float) -> dict[str, Any]:
    """Start a process for one request and return its answer; `{"error": reason}` if it does not answer in time."""
    process = _popen(log, subprocess.PIPE, MLFLOW)
    try:
        answer, _ = process.communicate(json.dumps(request).encode() + b"\n", timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": "no answer in time"}
    return json.loads(answer) if answer else {"error": f"the MLflow process exited, see {log}"}


def _popen(log: Path, stdout: int, module: str) -> "subprocess.Popen[bytes]":
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "perceiver_train.module", module],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=file,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
