"""What a job runs on the cluster: check what it needs there, then `perceiver train` or `tune`, started or resumed.

``python -m cluster.job --run NAME --output URL [--needs A,B] [--folder DIR] VERB FILE [key=value ...]``
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.run_folder import named_run
from perceiver.config import UserError

REFUSED = 2


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m cluster.job", description=__doc__)
    parser.add_argument("--run", required=True, help="name of the run: continued if it exists, else started")
    parser.add_argument("--output", required=True, help="folder or URL below which the run's folder lies")
    parser.add_argument("--needs", default="", help="environment variables that must be set on the cluster")
    parser.add_argument("--folder", help="folder that relative paths are meant from; default: the package")
    parser.add_argument("verb")
    parser.add_argument("file", help="a recipe, or a search")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args(words)


def command(given: argparse.Namespace) -> list[str]:
    """Return the `perceiver` command of this start: with ``--resume`` if the run exists.

    Raises:
        UserError: a variable is not set here.
    """
    missing = [name for name in given.needs.split(",") if name and name not in os.environ]
    if missing:
        raise UserError(
            f"the cluster does not know {', '.join(missing)}: set it where the nodes start (a Kubernetes secret, the "
            "autoscaler's setup commands, the shell of `perceiver cluster up`)"
        )
    exists = bool(named_run(given.output, given.run).facts())
    words = [sys.executable, "-m", "perceiver.cli", given.verb, given.file, *given.overrides, "--run", given.run]
    return [*words, "--resume"] if exists else words


def main(words: Sequence[str]) -> int:  # noqa: RET503  execve does not return
    """Become the command; returns an exit code only if something is refused."""
    given = arguments(words)
    package = str(Path.cwd())
    try:
        if given.folder:
            os.chdir(given.folder)
        argv = command(given)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    # The package's sources come first, not those that may lie in the folder.
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    os.execve(argv[0], argv, {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
