"""A real PostgreSQL server for tests, from Python packages with its programs and driver; nothing is installed."""

import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

from pipelines.packages import Package, fetch
from tests.perceiver.tracking.mlflow_server import free_port

PROGRAMS = Package(
    "pgserver==0.1.4",
    "pgserver-0.1.4-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "d595789b47624a3d963aa9aa6359da9be31beb7e61f1a45541953242068b8813",
)
DRIVER = Package(
    "psycopg2-binary==2.9.13",
    "psycopg2_binary-2.9.13-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    "930e7e58b33a4f9c39e7532d7a40147925cf3372baed4229cbebe0cf3ba9ce6b",
)
FITS = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info[:2] == (3, 11)
"""Return whether those packages support this machine."""


class Postgres:
    """A PostgreSQL server on loopback that asks for a password; `driver` is a folder for PYTHONPATH.

    Root may not run one, so root starts it as `nobody`, in a folder that others may enter.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.folder.chmod(0o755)
        self.driver, self.port, self.password = self.folder / "driver", free_port(), secrets.token_hex(8)
        self.user = "nobody" if os.geteuid() == 0 else None
        for package, place in ((PROGRAMS, self.folder / "programs"), (DRIVER, self.driver)):
            with zipfile.ZipFile(fetch(package)) as archive:
                archive.extractall(place)
        self.process = self._start()
        self._wait()

    @property
    def uri(self) -> str:
        """Return the URI of the database for SQLAlchemy."""
        return f"postgresql+psycopg2://mlflow:{self.password}@127.0.0.1:{self.port}/postgres"

    def _start(self) -> "subprocess.Popen[bytes]":
        data, secret = self.folder / "data", self.folder / "password"
        data.mkdir()
        secret.write_text(self.password)
        if self.user:
            shutil.chown(data, self.user)
        programs = self.folder / "programs" / "pgserver" / "pginstall" / "bin"
        for name in ("initdb", "postgres"):
            (programs / name).chmod(0o755)
        words = [programs / "initdb", "-D", data, "--username=mlflow", f"--pwfile={secret}", "--no-sync"]
        subprocess.run([*words, "--auth=scram-sha-256"], user=self.user, cwd=data, check=True, capture_output=True)
        settings = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off")
        words = [programs / "postgres", "-D", data, "-p", str(self.port), *(w for s in settings for w in ("-c", s))]
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(words, user=self.user, cwd=data, stdout=log, stderr=log)

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        pytest.fail((self.folder / "log").read_text())

    def stop(self) -> None:
        """Stop it and remove its files."""
        self.process.send_signal(signal.SIGINT)  # not SIGTERM, which waits for clients
        self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)
