"""`python -m tests.faults.race [ROUNDS [S3_ROUNDS]]`: processes that take over a dead driver's run at the same moment.

For 2, 4 and 8 processes, on a local disk and on an S3 server (moto): the number of rounds by the number of processes
that held the lease at once. In the first round there is no earlier driver.
"""

import contextlib
import multiprocessing
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cluster.record.lease import LeaseFile, acquire
from perceiver.config import UserError

PROCESSES = multiprocessing.get_context("fork")


def holders(url: str, processes: int) -> int:
    """Let processes acquire the lease of a run at once, end all without releasing it; return how many held it."""
    ready, held = PROCESSES.Barrier(processes), PROCESSES.Value("i", 0)

    def driver() -> None:
        file = LeaseFile(url)
        ready.wait(60)
        with contextlib.suppress(UserError):
            acquire(file)
            with held.get_lock():
                held.value += 1
        ready.wait(60)
        os._exit(0)

    started = [PROCESSES.Process(target=driver) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0, process.exitcode
    return held.value


def rounds(url: str, processes: int, count: int) -> Counter[int]:
    """Return how often so many processes held the lease of one run at once."""
    return Counter(holders(url, processes) for _ in range(count))


@contextlib.contextmanager
def bucket() -> Iterator[str]:
    """Yield the URL of a bucket of an S3 server that handles one request at a time, so that its conditions are atomic.

    It is in a thread of this process, which must not open the bucket itself: an event loop does not survive a fork.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: Any) -> None:
            return None

    moto, one = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def application(environ: Any, start_response: Any) -> Any:
        with one:
            return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = dict(os.environ)
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys, AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.port}")
    s3_backends["123456789012"]["global"].create_bucket("race", "us-east-1")
    try:
        yield "s3://race"
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.shutdown()


def main(local: int, remote: int) -> int:
    """Print a line for each store and number of processes; exit code 1 unless each round has one holder."""
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch, bucket() as url:
        for kind, place, count in (("local disk", scratch, local), ("S3", url, remote)):
            for processes in (2, 4, 8):
                found = rounds(f"{place}/run-{processes}", processes, count)
                print(f"{kind}, {processes} processes: {dict(found)} (holders: rounds)", flush=True)
                wrong += sum(times for number, times in found.items() if number != 1)
    return int(wrong > 0)


if __name__ == "__main__":
    counts = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*counts, *(200, 50)[len(counts) :]))
