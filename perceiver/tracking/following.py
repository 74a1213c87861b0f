"""What the processes that copy the rows of a run's record have in common: TensorBoard's and W&B's."""

import json
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

INTERVAL_S = 2.0


class Copier(Protocol):
    """Copies the rows of a record."""

    def send(self) -> None:
        """Copy the rows that are recorded and not copied yet."""

    def close(self) -> None:
        """Wait until everything is copied, and end."""


def follow(build: Callable[[Any], Copier]) -> None:
    """Copy until standard input, whose first line has the request, is closed; then copy the rest.

    Args:
        build: return the copier for a request, which was JSON.
    """
    request = json.loads(sys.stdin.buffer.readline())
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), ended.set()), daemon=True).start()
    copier = build(request)
    while not ended.is_set():
        copier.send()
        ended.wait(INTERVAL_S)
    copier.send()
    copier.close()
