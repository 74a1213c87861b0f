"""The jobs of a cluster: list, follow, wait for and stop them."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from cluster.jobs.server import JobServer
from cluster.record.failures import EXIT_STOPPED
from perceiver.config import UserError
from perceiver.tracking.printable import safe_line

RUN, OUTPUT, RECIPE, STOP_WAIT = "perceiver.run", "perceiver.output", "perceiver.recipe", "perceiver.stop_wait_s"
"""Metadata keys of a job."""

LIVE = ("PENDING", "RUNNING")
POLL_S = 0.5
POLL_LOG_S = 2.0
"""Seconds between two requests for a job's whole log, once its websocket has closed."""

ANSWER_WAIT_S = 120.0
"""How long a job server may not answer before its follower gives up."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A job of the cluster. Times are seconds since the epoch.

    Attributes:
        name: the submission id.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        run: name of its run; empty for a job that `perceiver submit` did not submit.
        exit_code: exit code of its command; None if it is running or was killed.
    """

    name: str
    status: str
    run: str = ""
    output: str = ""
    recipe: str = ""
    began: float | None = None
    ended: float | None = None
    message: str = ""
    exit_code: int | None = None
    stop_wait_s: int = 0

    @property
    def live(self) -> bool:
        """Whether the job has not ended."""
        return self.status in LIVE

    def code(self) -> int:
        """Return the exit code of a command that waited for the job: the job's own, 130 if it was stopped."""
        if self.status == "STOPPED":
            return EXIT_STOPPED
        return 0 if self.status == "SUCCEEDED" else self.exit_code or 1

    def facts(self) -> dict[str, Any]:
        """Return all attributes as a dictionary, for JSON."""
        return asdict(self)


def list_jobs(server: JobServer) -> list[Job]:
    """Return the submitted jobs of a cluster, oldest first."""
    with server.answers():
        details = server.client.list_jobs()
    found = [_job(detail) for detail in details if detail.submission_id]
    return sorted(found, key=lambda job: job.began or time.time())


def find_job(server: JobServer, name: str) -> Job:
    """Return a job by its name, or the newest job of a run.

    Raises:
        UserError: there is no such job or run.
    """
    jobs = list_jobs(server)
    named = [job for job in jobs if job.name == name] or [job for job in jobs if job.run == name]
    if not named:
        there = ", ".join(job.name for job in jobs[-5:]) or "none"
        raise UserError(f"no job or run {name!r} at {server.url}; its jobs: {there}")
    return named[-1]


def follow(server: JobServer, job: Job, write: Callable[[str], None]) -> Job:
    """Write the output of a job until it ends; return the ended job. The job does not depend on its follower.

    Some proxies close an idle websocket, or do not support websockets; then the whole log is polled and only its new
    part is written. A server that does not answer may be that of a head which starts again; it gets `ANSWER_WAIT_S`.

    Raises:
        UserError: the server did not answer for that long.
    """
    if not job.live:
        write(logs(server, job))
        return job
    length, silent_since = _tail(server, job, write), None
    while True:
        try:
            # The state is read before the log, so that no output before the end is missed.
            job = find_job(server, job.name)
            text = logs(server, job)
        except UserError as error:
            if not job.live:
                return job  # the log is lost with its node
            if silent_since is None:
                silent_since = time.monotonic()
                write(f"note: {error}; waiting up to {ANSWER_WAIT_S:.0f} s for an answer, the job may still run\n")
            if time.monotonic() - silent_since > ANSWER_WAIT_S:
                raise
            time.sleep(POLL_LOG_S)
            continue
        silent_since = None
        if len(text) > length:
            write(text[length:])
            length = len(text)
        if not job.live:
            return job
        time.sleep(POLL_LOG_S)


def _tail(server: JobServer, job: Job, write: Callable[[str], None]) -> int:
    """Write the output of a job until its websocket closes; return the number of characters."""
    import aiohttp

    length = 0

    async def tail() -> None:
        nonlocal length
        async for text in server.client.tail_job_logs(job.name):
            write(text)
            length += len(text)

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        try:
            loop.run_until_complete(tail())
        except (aiohttp.ClientError, RuntimeError, OSError, TimeoutError) as error:
            log.info("the websocket of the log of %s was closed (%s)", job.name, error)
    return length


def logs(server: JobServer, job: Job) -> str:
    """Return the output of a job so far."""
    with server.answers(f"the logs of {job.name}"):
        return server.client.get_job_logs(job.name)


def wait(server: JobServer, name: str, seconds: float | None = None) -> Job:
    """Wait until a job has ended; return it.

    Raises:
        UserError: it has not ended after `seconds`.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    while (job := find_job(server, name)).live:
        if deadline is not None and time.monotonic() > deadline:
            raise UserError(f"{name} is still {job.status} after {seconds:g} s: see perceiver logs {name}")
        time.sleep(POLL_S)
    return job


def stop(server: JobServer, job: Job) -> tuple[Job, list[str]]:
    """Stop a job and wait until it has saved its checkpoint; return it and the lines that it printed meanwhile.

    Ray kills a job that has not ended ``cluster.stop_wait_s`` seconds after the request.
    """
    before = logs(server, job) if job.status == "RUNNING" else ""
    with server.answers(f"to stop {job.name}"):
        server.client.stop_job(job.name)
    ended = wait(server, job.name, (job.stop_wait_s or 3) + 30)
    lines = logs(server, job)[len(before) :].splitlines() if before else []
    return ended, [line for line in lines if line.strip()]


def _job(detail: Any) -> Job:
    metadata = detail.metadata or {}
    message = (detail.message or "").strip().splitlines()
    return Job(
        name=detail.submission_id,
        status=str(getattr(detail.status, "value", detail.status)),
        run=metadata.get(RUN, ""),
        output=metadata.get(OUTPUT, ""),
        recipe=metadata.get(RECIPE, ""),
        began=detail.start_time / 1000 if detail.start_time else None,
        ended=detail.end_time / 1000 if detail.end_time else None,
        message=message[-1][:300] if message else "",
        exit_code=detail.driver_exit_code,
        stop_wait_s=int(metadata.get(STOP_WAIT, 0)),
    )


def table(jobs: list[Job]) -> list[str]:
    """Return the lines of a table of jobs."""
    rows: list[tuple[str, ...]] = [("JOB", "STATUS", "RUN", "RECIPE", "BEGAN", "TOOK")]
    for job in jobs:
        began = datetime.fromtimestamp(job.began).strftime("%m-%d %H:%M:%S") if job.began else "-"
        row = (job.name, job.status, job.run or "-", job.recipe or "-", began, _took(job))
        rows.append(tuple(map(safe_line, row)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _took(job: Job) -> str:
    if job.began is None:
        return "-"
    minutes, seconds = divmod(int((job.ended or time.time()) - job.began), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
