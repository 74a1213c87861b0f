"""A search between its checks and its end: what was planned, how it was started, and what it holds while it runs."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cluster.recipe.config import absolute
from cluster.record.run_folder import RunFolder
from cluster.runtime.session import go_on_command, tracking_of
from perceiver.tracking.runs import TrackingConfig
from perceiver.tracking.tracker import NullTracker, Tracker
from tune.config import Search
from tune.record import SearchRecord
from tune.search.checks import Checker
from tune.search.console import SearchConsole
from tune.search.resources import Slots
from tune.space.space import Values


@dataclass(frozen=True)
class SearchStart:
    """How the user starts or resumes a search.

    Attributes:
        command: what was typed, for the lines that say how to go on.
        resume: go on with the newest search of the name, or with ``run``.
        run: name of the search's folder.
        as_json: print the outcome as one JSON line at the end.
        more: what to do for more trials when all are done.
    """

    command: str
    resume: bool = False
    run: str | None = None
    as_json: bool = False
    more: str = "raise trials to go on"


@dataclass(frozen=True)
class SearchPlan:
    """A search that passed its checks: ``known`` are its trials where they do not depend on results.

    Attributes:
        labels: what the known trials are called beside their numbers: rows of a table; empty for others.
        rows: what each row changes, kept beside the search and compared when it is resumed.
    """

    search: Search
    checker: Checker
    slots: Slots
    known: list[Values] | None
    labels: tuple[str, ...] = ()
    rows: dict[str, Values] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Return how many trials the search comes to."""
        return len(self.known) if self.known is not None else self.search.config.trials


@dataclass
class SearchLaunch:
    """One start of a search: what is searched, where it lies, and where its lines go."""

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
        """Return how the cluster is divided."""
        return self.plan.slots

    @property
    def total(self) -> int:
        """Return how many trials the search comes to."""
        return self.plan.total

    @property
    def go_on(self) -> str:
        """Return the command that goes on with this search."""
        return go_on_command(self.start.command, self.folder)

    @property
    def tracking(self) -> TrackingConfig:
        """Return where the search and its trials are tracked."""
        return tracking_of(self.search.recipe.tracking, self.folder, self.search.config.name)

    @property
    def trials_url(self) -> str:
        """Return the folder that the trials' run folders lie in."""
        return absolute(self.folder.location("trials"))


Concluder = Callable[[SearchLaunch, dict[str, Any]], int]
"""Says how a search ended, leaves its results behind, and returns the exit code."""
