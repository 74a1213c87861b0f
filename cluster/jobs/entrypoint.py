"""The entrypoint of a job on the cluster: check its environment, then start or resume `perceiver train` or `tune`.

``python -P -m perceiver_train.module cluster.jobs.entrypoint --run NAME --output URL [--needs A,B] [--folder DIR]
[--sent] VERB FILE [key=value ...]``
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.jobs.plugins import check_installed
from cluster.recipe.placement import RESERVED
from cluster.record.failures import one_line
from cluster.record.run_folder import named_run
from perceiver.config import UserError
from perceiver.storage import is_refusal
from perceiver.tracking.printable import say
from perceiver.tracking.redaction import redact_text
from perceiver.train.checkpoint.hook import refusal

REFUSED = 2


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="cluster.jobs.entrypoint", description=__doc__)
    parser.add_argument("--run", required=True, help="name of the run, continued if it exists")
    parser.add_argument("--output", required=True, help="folder or URL that contains the run's folder")
    parser.add_argument("--needs", default="", help="environment variables that must be set on the cluster")
    parser.add_argument("--folder", help="folder that relative paths start from; default: the package")
    parser.add_argument("--sent", action="store_true", help="the file is in the package, not in that folder")
    parser.add_argument("--packages", default="", help="packages, name==version, whose plug-ins the recipe uses")
    parser.add_argument("--reserved", help="JSON of the resources that this command reserves on its node")
    parser.add_argument("verb")
    parser.add_argument("file", help="a recipe, or a search")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args(words)


def command(given: argparse.Namespace) -> list[str]:
    """Return the `perceiver` command of this start: with ``--resume`` if the run exists.

    Raises:
        UserError: a variable is not set here, a plug-in is not installed, or the run's folder cannot be read.
    """
    missing = [name for name in given.needs.split(",") if name and name not in os.environ]
    if missing:
        raise UserError(
            f"{', '.join(missing)} is not set on the cluster: set it where the nodes start (a Kubernetes secret, the "
            "autoscaler's setup commands, the shell of `perceiver cluster up`)"
        )
    check_installed([package for package in given.packages.split(",") if package])
    words = [sys.executable, "-m", "perceiver_train", given.verb, given.file, *given.overrides, "--run", given.run]
    return [*words, "--resume"] if exists(given.output, given.run) else words


def exists(output: str, run: str) -> bool:
    """Return whether a run exists.

    Raises:
        UserError: its folder cannot be read.
    """
    folder = named_run(output, run)
    shown = redact_text(folder.url)
    try:
        return bool(folder.facts())
    except UserError as error:
        raise UserError(f"{redact_text(str(error))}, or give another --run") from None
    except ImportError as error:
        raise UserError(
            f"the cluster cannot read {shown} ({error}): install perceiver-train[s3] in its image, or submit with "
            "--install"
        ) from None
    except Exception as error:  # noqa: BLE001  each store raises its own
        reason = redact_text(one_line(error))
        if is_refusal(error):
            raise UserError(f"on the cluster {refusal(shown, reason)}, set where the nodes start") from None
        raise UserError(
            f"the cluster cannot read {shown} ({reason}): check output and the nodes' access to it"
        ) from None


def main(words: Sequence[str]) -> int:  # noqa: RET503  execve does not return
    """Replace this process by the command; return exit code 2 if the job is refused."""
    given = arguments(words)
    try:
        if given.sent:
            given.file = str(Path(given.file).resolve())
        if given.folder:
            os.chdir(given.folder)
        argv = command(given)
    except (UserError, OSError) as error:
        say(f"error: {error}", err=True)
        return REFUSED
    held = {RESERVED: given.reserved} if given.reserved else {}
    os.execve(argv[0], argv, {**os.environ, **held, "PYTHONSAFEPATH": "1"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
