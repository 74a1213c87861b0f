"""Run the command line in separate processes, and check that none is left."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.homes import share_kernels

PERCEIVER = str(Path(sys.executable).with_name("perceiver"))


def start(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start the command in its own folder with its own home, and with environment variables."""
    environment = {**os.environ, **variables, "HOME": str(share_kernels(tmp_path)), "COLUMNS": "200"}
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        environment.pop(name, None)
    return subprocess.Popen(
        [PERCEIVER, *arguments],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Run the command to its end; return exit code and output."""
    process = start(tmp_path, *arguments)
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Wait until a condition is true; the process must not end before."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def trials(folder: Path) -> list[dict[str, Any]]:
    """Return the trials that a search has recorded so far."""
    path = folder / "trials.json"
    return json.loads(path.read_text())["trials"] if path.exists() else []


def left_behind(tmp_path: Path) -> list[str]:
    """Return the command lines of processes that still have this test's home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(tmp_path):
                found.append(" ".join(process.cmdline())[:80])
        except psutil.Error:
            continue
    return found


def all_gone(tmp_path: Path) -> bool:
    """Return whether all processes of the test's commands end within the time that helpers take to notice."""
    deadline = time.monotonic() + 60
    while left_behind(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not left_behind(tmp_path)
