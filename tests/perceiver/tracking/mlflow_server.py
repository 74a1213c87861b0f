"""A real MLflow server for tests, which can be stopped and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Server:
    """A real MLflow server on loopback that can be stopped and started again on the same port."""

    def __init__(self, folder: Path, port: int, database: str = "", **environment: str) -> None:
        self.folder, self.port, self.store = folder, port, folder / "mlflow.db"
        self.database = database or f"sqlite:///{self.store}"
        # Otherwise the server starts eight more processes, for evaluations of language models.
        self.environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}
        self.uri = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    def start(self) -> None:
        """Start it and wait until it listens."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", self.database]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.process = listening(command, self.port, self.folder / "log", self.environment)

    def stop(self) -> None:
        """Kill it, if it runs."""
        if self.process is not None:
            end(self.process)
            self.process = None


def listening(command: list[str], port: int, log: Path, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a command in a separate process group and wait until it listens on a port."""
    with log.open("ab") as file:
        env = {**os.environ, **environment}
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what `listening` started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
