"""The state of a search: its plan after the checks, its start options, and the objects of the running search."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cluster.record.run_folder import RunFolder
from cluster.run.console import Show
from cluster.runtime.session import continue_command, tracking_of
from perceiver.storage import absolute
from perceiver.tracking.runs import TrackingConfig
from perceiver.tracking.tracker import NullTracker, Tracker
from tune.config import Search
from tune.search.checks import Checker
from tune.search.console import SearchConsole
from tune.search.resources import Slots
from tune.search_record import SearchRecord
from tune.space.space import Values


@dataclass(frozen=True)
class SearchStart:
    """The start options of a search.

    Attributes:
        command: the command line, for the lines about how to continue.
        resume: continue the newest search of the name, or ``run``.
        run: name of the search's folder.
        as_json: print the outcome as one JSON line at the end.
        more: how to add trials when all are done.
        show: what to print.
    """

    command: str
    resume: bool = False
    run: str | None = None
    as_json: bool = False
    more: str = "raise trials to continue"
    show: Show = "shell"


@dataclass(frozen=True)
class SearchPlan:
    """A checked search.

    Attributes:
        known: the trials if they do not depend on results.
        labels: labels of the known trials: rows of a table; else empty.
        rows: the changes of each row, stored with the search and compared when it is resumed.
        origins: the trials whose weights parts of a trial's model start from, by the part, by the trial's number.
    """

    search: Search
    checker: Checker
    slots: Slots
    known: list[Values] | None
    labels: tuple[str, ...] = ()
    rows: dict[str, Values] = field(default_factory=dict)
    origins: dict[int, dict[str, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Return the number of trials of the search."""
        return len(self.known) if self.known is not None else self.search.config.trials


@dataclass
class SearchLaunch:
    """One start of a search."""

    plan: SearchPlan
    start: SearchStart
    folder: RunFolder
    record: SearchRecord
    waiting: list[int]
    console: SearchConsole
    background: ThreadPoolExecutor
    began: float = field(default_factory=time.monotonic)
    tracker: Tracker = field(default_factory=NullTracker)

    @property
    def search(self) -> Search:
        """Return the search."""
        return self.plan.search

    @property
    def checker(self) -> Checker:
        """Return the checker of the search's recipes."""
        return self.plan.checker

    @property
    def slots(self) -> Slots:
        """Return the division of the cluster."""
        return self.plan.slots

    @property
    def total(self) -> int:
        """Return the number of trials of the search."""
        return self.plan.total

    @property
    def continue_with(self) -> str:
        """Return the command that continues this search."""
        return continue_command(self.start.command, self.folder)

    @property
    def tracking(self) -> TrackingConfig:
        """Return where the search and its trials are tracked."""
        return tracking_of(self.search.recipe.tracking, self.folder, self.search.config.name)

    @property
    def trials_url(self) -> str:
        """Return the folder of the trials' run folders."""
        return absolute(self.folder.location("trials"))


Concluder = Callable[[SearchLaunch, dict[str, Any]], int]
"""Writes the results of a search, prints its outcome, and returns the exit code."""
