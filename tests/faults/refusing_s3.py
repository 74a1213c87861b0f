"""An S3 server (moto) that takes back the right to write at some moment."""

import threading
from collections.abc import Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class RefusingS3:
    """The server; from `refusing.set()` on it denies everything but reads."""

    def __init__(self) -> None:
        self.refusing = threading.Event()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._application, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._thread.join()

    def _application(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.refusing.is_set() and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start_response("403 Forbidden", [("Content-Type", "text/xml"), ("Content-Length", str(len(DENIED)))])
            return [DENIED]
        return self._moto(environ, start_response)
