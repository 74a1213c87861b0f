"""The outcomes of the rows in a file of JSON lines, so that an interrupted table goes on, and their summary."""

import hashlib
import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.faults.job import Outcome

ROOT = Path(__file__).parents[2]


CODE = ("perceiver", "pipelines", "cluster", "tune", "tests/faults", "tests/cluster/recipes.py", "constraints.txt")


def version() -> str:
    """Return an id of the committed code, the same after commits of other files; empty without git."""
    command = ["git", "rev-parse", *(f"HEAD:{path}" for path in CODE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return hashlib.sha256(done.stdout.encode()).hexdigest()[:12] if done.returncode == 0 else ""


class Record:
    """The file: a line per outcome, with the row and the version of the code. Lines of another version do not count.

    Args:
        path: the file; None: nothing is kept.
        version: see `version`.
    """

    def __init__(self, path: Path | None, version: str) -> None:
        self.path, self.version = path, version
        self.found: dict[str, list[Outcome]] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                if entry.pop("version") == version:
                    self.found.setdefault(entry.pop("row"), []).append(Outcome(**entry))

    def outcomes(self, row: str) -> list[Outcome]:
        """Return the outcomes of a row so far."""
        return self.found.setdefault(row, [])

    def add(self, row: str, outcome: Outcome) -> None:
        """Add an outcome."""
        self.outcomes(row).append(outcome)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"row": row, "version": self.version, **asdict(outcome)}) + "\n")


def summary(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Return the cells of a row: of each figure the median, and of several outcomes the least and the most."""

    def cell(figures: Sequence[float | None], digits: int) -> str:
        known = [figure for figure in figures if figure is not None]
        if not known:
            return "-"
        middle = f"{statistics.median(known):.{digits}f}"
        return middle if len(outcomes) == 1 else f"{middle} ({min(known):.{digits}f} to {max(known):.{digits}f})"

    failures = [failure for outcome in outcomes for failure in outcome.failures]
    passed = sum(outcome.passed for outcome in outcomes)
    share = "" if len(outcomes) == 1 else f"{passed} of {len(outcomes)}"
    return (
        outcomes[-1].fault,
        cell([outcome.detected_s for outcome in outcomes], 1),
        cell([outcome.first_step_s for outcome in outcomes], 1),
        cell([outcome.steps_lost for outcome in outcomes], 0),
        cell([outcome.samples_wrong for outcome in outcomes], 0),
        (share or "yes") if not failures else f"NO{share and f', {share}'}: {'; '.join(failures)}",
    )
