"""A helper process of one's own, talked to in JSON lines, that can be given a deadline and cannot outlive its parent.

A library that is slow to import, retries for minutes or prints to the terminal does so in the helper: the parent keeps
its interpreter lock, its deadline and its terminal.
"""

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Reply = dict[str, Any]
ORPHAN_GRACE_S = 10.0
LOG = "log"
"""Key of a request that names the file for the helper's messages from then on."""


class SidecarError(Exception):
    """The helper gave no answer in time, died, or reports a failure. `kind` names the failure's class, if known."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Sidecar:
    """Starts the helper at the first call, and again after it died or was killed for being late.

    Args:
        code: Python source that the helper runs; it should end in `serve`.
        log: file that takes the helper's standard output and error.
        env: variables set for the helper beside the parent's.
        nice: added to its niceness, so that it takes only what the parent's computation leaves.
    """

    def __init__(self, code: str, log: Path, env: Mapping[str, str] | None = None, nice: int = 0) -> None:
        self.code = code
        self.log = log
        self.env = dict(env or {})
        self.nice = nice
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def start(self) -> None:
        """Start the process if it is not running; it loads its libraries while the parent goes on."""
        if self._process is not None and self._process.poll() is None:
            return
        self._buffer = b""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(entry for entry in sys.path if entry)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import os; os.nice({self.nice})\n{self.code}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self.env, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    def call(self, request: Mapping[str, Any], timeout_s: float) -> Reply:
        """Send a request and wait for its answer.

        Raises:
            SidecarError: it failed, or there was no answer within `timeout_s` (the helper is killed then).
        """
        try:
            self.start()
            process = self._process
            assert process is not None and process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            reply = json.loads(self._read_line(process, time.monotonic() + timeout_s))
        except (OSError, ValueError) as error:
            self.kill()
            raise SidecarError(f"the helper process failed ({error}); see {self.log}") from error
        except SidecarError:
            self.kill()
            raise
        if "error" in reply:
            raise SidecarError(reply["error"], reply.get("kind", ""))
        return reply

    def _read_line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        assert process.stdout is not None
        fd = process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise SidecarError("no answer in time", "timeout")
            data = os.read(fd, 65536)
            if not data:
                raise SidecarError(f"the helper process ended; see {self.log}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def kill(self) -> None:
        """End the helper at once."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            _reap(process, 5.0)

    def close(self, timeout_s: float = 2.0) -> None:
        """Let the helper end by itself, or kill it after `timeout_s`."""
        process, self._process = self._process, None
        if process is not None:
            _reap(process, timeout_s)


class SharedSidecar(Sidecar):
    """A helper that several users of one process call by turns; it stays until the process ends."""

    def __init__(self, code: str, log: Path, env: Mapping[str, str] | None = None, nice: int = 0) -> None:
        super().__init__(code, log, env, nice)
        self._turn = threading.RLock()
        self._moved = False

    def start(self) -> None:
        """See `Sidecar`."""
        with self._turn:
            super().start()

    def log_to(self, log: Path) -> None:
        """Have the helper write its messages to another file from its next request on."""
        with self._turn:
            self._moved, self.log = self.log != log, log

    def call(self, request: Mapping[str, Any], timeout_s: float) -> Reply:
        """See `Sidecar`; the deadline begins when it is this call's turn."""
        with self._turn:
            if self._moved:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                request, self._moved = {**request, LOG: str(self.log.resolve())}, False
            return super().call(request, timeout_s)

    def close(self, timeout_s: float = 2.0) -> None:
        """Do nothing: others may still call."""


def _reap(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Close the pipes and wait for the end, which comes by force if it does not come in time."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5.0)
    process.stdout.close()


def serve(handle: Callable[[dict[str, Any]], Reply]) -> None:
    """The helper's side: answer requests from standard input until it is closed or the parent is gone.

    Whatever prints to standard output is sent to standard error. `handle` answers a failure with
    `{"error": message, "kind": class name}`; an exception ends the helper.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    parent = os.getppid()
    requests: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    while True:
        try:
            line = requests.get(timeout=5.0)
        except queue.Empty:
            if os.getppid() != parent:
                return
            continue
        if line is None:
            return
        request = json.loads(line)
        if log := request.pop(LOG, ""):
            with Path(log).open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
        answers.write(json.dumps(handle(request)).encode() + b"\n")
        answers.flush()


def _read_requests(requests: "queue.Queue[bytes | None]") -> None:
    """Pass lines on; after the end of input, do not let a call that hangs keep the process alive."""
    for line in sys.stdin.buffer:
        requests.put(line)
    requests.put(None)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)
