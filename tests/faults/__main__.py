"""`python -m tests.faults [NAME ...]`: inject faults into real runs and print a table; exit code 1 if a row failed."""

import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster.recipes import prepare_images, small_tree
from tests.faults.job import Outcome, row
from tests.faults.scenarios import chosen

HEAD = ("fault", "detected in s", "first new step in s", "steps lost", "samples lost or doubled", "passed")


def main(names: list[str]) -> int:
    """Run the scenarios whose names contain one of the given texts, or all if none is given."""
    rows = chosen(names)
    outcomes: list[Outcome] = []
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, Python {platform.python_version()}\n")
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as scratch:
        url = prepare_images(Path(scratch))
        for number, (name, run) in enumerate(rows.items()):
            folder = Path(scratch, str(number))
            folder.mkdir()
            try:
                outcomes.append(run(folder, small_tree(folder, url)))
            except Exception as error:  # noqa: BLE001  an error in one must not hide the others
                outcomes.append(Outcome(name, failures=[f"{type(error).__name__}: {error}"]))
            cells = [cell.replace("\n", " / ").replace("|", "/") for cell in row(outcomes[-1])]
            print("| " + " | ".join(cells) + " |", flush=True)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that started processes are terminated
    sys.exit(main(sys.argv[1:]))
