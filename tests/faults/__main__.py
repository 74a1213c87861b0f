"""`python -m tests.faults [NAME ...]`: inject faults into real runs and print a table; exit code 1 if a row failed.

`--repeat 3` runs each row three times and prints medians with the least and the most. `--record FILE` keeps each
outcome: the same command again, on the same code, runs what is missing.
"""

import argparse
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.recipes import prepare_images, small_tree
from tests.faults.job import Outcome
from tests.faults.record import Record, summary, version
from tests.faults.scenarios import chosen
from tests.faults.table import Scenario

HEAD = ("fault", "detected in s", "first new step in s", "steps lost", "samples lost or doubled", "passed")


def main(words: Sequence[str]) -> int:
    """Run the scenarios whose names contain one of the given texts, or all if none is given."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows whose names contain one of these; default: all")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="run each row N times")
    parser.add_argument("--record", type=Path, metavar="FILE", help="JSON lines of the outcomes, to continue from")
    given = parser.parse_args(words)
    if given.repeat < 1:
        parser.error(f"--repeat {given.repeat}: wanted at least 1")
    record, rows = Record(given.record, version()), chosen(given.names)
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, Python {platform.python_version()}\n")
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as scratch:
        url = ""
        for name, run in rows.items():
            while len(record.outcomes(name)) < given.repeat:
                url = url or prepare_images(Path(scratch))
                record.add(name, attempt(name, run, Path(tempfile.mkdtemp(dir=scratch)), url))
            cells = [cell.replace("\n", " / ").replace("|", "/") for cell in summary(record.outcomes(name))]
            print("| " + " | ".join(cells) + " |", flush=True)
    return 0 if all(outcome.passed for name in rows for outcome in record.outcomes(name)) else 1


def attempt(name: str, run: Scenario, folder: Path, url: str) -> Outcome:
    """Run a row once; an error in it must not hide the other rows."""
    try:
        return run(folder, small_tree(folder, url))
    except Exception as error:  # noqa: BLE001
        return Outcome(name, failures=[f"{type(error).__name__}: {error}"])


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that started processes are terminated
    sys.exit(main(sys.argv[1:]))
