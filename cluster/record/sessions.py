"""How long a run was worked on: its sessions, one per start, in run.json as pairs of begin and end.

A driver that is killed does not record its end; the next one takes the last time that the run's record has.
"""

import time
from typing import NamedTuple

from cluster.record.run_folder import RunFolder
from perceiver.tracking.record import HISTORY, read_rows
from perceiver.train.checkpoint.store import CheckpointManifest


class WorkTime(NamedTuple):
    """Seconds of all sessions of a run, without the pauses between them, and their number."""

    seconds: float
    sessions: int

    def __str__(self) -> str:
        if self.sessions == 1:
            return f"{self.seconds:.0f} s, start-up included"
        return f"{self.seconds:.0f} s in {self.sessions} sessions, start-ups included"


def begin_session(folder: RunFolder, began: float, checkpoint: CheckpointManifest | None) -> None:
    """Note the begin of a session, and the end of one whose driver was killed.

    Args:
        folder: of the run; its history must not have been rewound yet.
        began: begin of this session, in seconds since the epoch.
        checkpoint: from which the run is resumed.
    """
    sessions = folder.facts().get("sessions", [])
    if sessions and sessions[-1][1] is None:
        first = sessions[-1][0]
        sessions[-1] = (first, max(first, _last_row(folder), checkpoint.created if checkpoint else 0.0))
    folder.note(sessions=[*sessions, (began, None)])


def work_time(folder: RunFolder) -> WorkTime:
    """Return the time of all sessions, the present one included."""
    now = time.time()
    sessions = folder.facts().get("sessions", [])
    return WorkTime(sum((now if end is None else end) - began for began, end in sessions), len(sessions))


def ended_sessions(folder: RunFolder) -> list[tuple[float, float]]:
    """Return the sessions with the present one ended now, for run.json."""
    now = time.time()
    return [(began, now if end is None else end) for began, end in folder.facts().get("sessions", [])]


def _last_row(folder: RunFolder) -> float:
    """Return the time of the last recorded metrics on this machine; 0 without any."""
    offset, last = 0, 0.0
    while True:
        rows, end = read_rows(folder.local / HISTORY, offset)
        if end == offset:
            return last
        offset, last = end, float(rows[-1].get("time", last)) if rows else last
