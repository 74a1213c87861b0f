"""The table of faults: each row is a function that starts a real run, injects a fault, and reports the outcome."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.job import Job, Outcome

STEPS = 60
Scenario = Callable[[Path, dict[str, Any]], Outcome]
Row = Callable[[Path, dict[str, Any], Outcome], Any]
SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str) -> Callable[[Row], Scenario]:
    """Register a function in the table; it gets a folder, the small recipe's tree and the row to fill."""

    def enter(function: Row) -> Scenario:
        def run(folder: Path, tree: dict[str, Any]) -> Outcome:
            outcome = Outcome(name)
            function(folder, tree, outcome)
            return outcome

        SCENARIOS[name] = run
        return run

    return enter


def chosen(names: list[str]) -> dict[str, Scenario]:
    """Return the rows whose names contain one of the texts, all if none is given; refuse a text that matches none."""
    for name in names:
        if not any(name in row for row in SCENARIOS):
            raise SystemExit(f"no fault is called {name!r}; there are: {', '.join(SCENARIOS)}")
    return {row: run for row, run in SCENARIOS.items() if not names or any(name in row for name in names)}


def expect_finished(job: Job, outcome: Outcome) -> None:
    """Expect the command to exit with code 0 and to leave no process and no shared memory behind."""
    outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
    outcome.expect(not (left := job.leftovers()), f"processes left behind: {[process.pid for process in left]}")
    outcome.expect(not (files := job.shared_left()), f"left in /dev/shm: {sorted(files)[:5]}")
