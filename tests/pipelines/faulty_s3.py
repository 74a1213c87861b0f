"""An S3 server (moto) in a thread that answers some requests with faults, as real ones do."""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

FAULTS = ("error 500", "slow down", "reset", "stall")
SEED = 1


class FaultyS3:
    """The server; `rate` is the share of GET requests that fail, each fault equally often.

    Args:
        stall: seconds that a stalled answer hangs in the middle of its body.
    """

    def __init__(self, stall: float = 1.0) -> None:
        self.stall = stall
        self.reset()
        self._lock = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._application, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Disable faults and reset the counts; later faults do not depend on earlier ones."""
        self.rate = self.delay = 0.0
        self.met: Counter[str] = Counter()
        self._random = random.Random(SEED)

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._thread.join()

    def _application(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        time.sleep(self.delay)
        with self._lock:
            fault = ""
            if environ["REQUEST_METHOD"] == "GET" and self._random.random() < self.rate:
                fault = self._random.choice(FAULTS)
            self.met[fault or "good"] += 1
        if fault == "error 500":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        if fault == "slow down":
            body = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"
            start_response("503 Slow Down", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
            return [body]
        answer = self._moto(environ, start_response)
        return self._broken(answer, fault) if fault else answer

    def _broken(self, answer: Iterable[bytes], fault: str) -> Iterator[bytes]:
        data = b"".join(answer)
        yield data[: len(data) // 2]
        if fault == "reset":
            raise ConnectionResetError("injected")
        time.sleep(self.stall)
        yield data[len(data) // 2 :]
