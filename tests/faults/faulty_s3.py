"""An S3 server (moto) that fails, stalls or revokes write access, and runs that use it as their store."""

import hashlib
import json
import logging
import random
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

from perceiver.tracking.record import HISTORY
from tests.faults.job import RUN, Job

BUCKET = "bucket"
IDENTITY = "testing-1234"
OBSERVER = "observer"
"""The access key that is always served; the harness uses it."""
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"


class FaultyS3:
    """The server, with the faults that can be switched on while it runs.

    Attributes:
        refusing: while set, everything but reads is denied.
        answering: while cleared, all requests wait.
        failing: share of the requests that get a server error.
        delay_s: seconds that each request waits.
        harmed: number of requests that were refused, delayed or failed.
    """

    def __init__(self) -> None:
        self.refusing, self.answering = threading.Event(), threading.Event()
        self.answering.set()
        self.failing, self.delay_s, self.harmed = 0.0, 0.0, 0
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._random = random.Random(0)
        self._moto = DomainDispatcherApplication(create_backend_app)
        s3_backends.reset()  # the data of an earlier server in this process
        self._server = make_server("127.0.0.1", 0, self._application, threaded=True)
        self._server.daemon_threads = True  # pyright: ignore[reportAttributeAccessIssue] of the threaded server
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> "FaultyS3":
        return self

    def __exit__(self, *_: object) -> None:
        self.answering.set()
        self._server.shutdown()
        self._thread.join()

    def _application(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if OBSERVER not in environ.get("HTTP_AUTHORIZATION", ""):
            self.harmed += not self.answering.is_set()
            self.answering.wait()
            time.sleep(self.delay_s)
            if self.refusing.is_set() and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                return self._error(environ, start_response, "403 Forbidden", "AccessDenied")
            if self._random.random() < self.failing:
                return self._error(environ, start_response, "503 Service Unavailable", "SlowDown")
        return self._moto(environ, start_response)

    def _error(self, environ: dict[str, Any], start_response: Any, status: str, code: str) -> Iterable[bytes]:
        self.harmed += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = b"" if environ["REQUEST_METHOD"] == "HEAD" else ERROR.format(code=code).encode()
        start_response(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
        return [body]


class S3Job(Job):
    """A run whose output is on such a server."""

    def __init__(self, folder: Path, tree: dict[str, Any], server: FaultyS3) -> None:
        keys = {"AWS_ACCESS_KEY_ID": IDENTITY, "AWS_SECRET_ACCESS_KEY": "testing", "AWS_ENDPOINT_URL": server.url}
        super().__init__(folder, {**tree, "output": f"s3://{BUCKET}/runs"}, {**keys, "AWS_DEFAULT_REGION": "us-east-1"})
        options = {"key": OBSERVER, "secret": "testing", "endpoint_url": server.url, "use_listings_cache": False}
        self.fs = fsspec.filesystem("s3", **options, skip_instance_cache=True)
        self.fs.mkdir(BUCKET)
        self.remote = f"{BUCKET}/runs/{RUN}"
        self.poll_s = 0.5
        url = hashlib.sha256(f"s3://{self.remote}".encode()).hexdigest()[:12]
        self.record = folder / ".cache" / "perceiver" / "runs" / f"{RUN}-{url}" / HISTORY

    def facts(self) -> dict[str, Any]:
        """Return the content of run.json."""
        return json.loads(self.fs.cat_file(f"{self.remote}/run.json")) if self.fs.exists(self.remote) else {}

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        manifests = self.fs.glob(f"{self.remote}/checkpoints/step-*/manifest.json")
        return sorted(int(str(path).split("/")[-2].removeprefix("step-")) for path in manifests)

    def end(self) -> int:
        """Wait for the end of the command, copy the run to the local folder, and return the exit code."""
        code = super().end()
        if self.fs.exists(self.remote):
            self.fs.get(self.remote, str(self.run), recursive=True)
        return code
