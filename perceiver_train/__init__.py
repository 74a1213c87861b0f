"""Starts our processes where files or folders of others have the names of our packages.

A `cluster.py` in the current folder, in the script's folder or on PYTHONPATH comes before our package on `sys.path`, on
that of Ray's workers too. This package has a name that nobody else uses and imports ours from next to itself.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("perceiver", "pipelines", "cluster", "tune")
PIN = f"{__name__}.pin"
"""Name of `pin`, as Ray's ``worker_process_setup_hook`` takes it."""

_HERE = Path(__file__).resolve().parent
PLACES = [str(_HERE), str(_HERE.parent)]
"""Folders that contain our packages: this one in a job (`cluster.jobs.package`), the one above it where installed."""


def pin() -> None:
    """Import our packages, whatever `sys.path` finds under their names; later imports of their modules follow them.

    Ray calls this in each worker, before the worker adds the driver's folders to its `sys.path`. So plug-ins are
    those of the path until then, too, and not a `NAME.dist-info` in the driver's folders.

    Raises:
        ImportError: a module of another origin with such a name is imported already, or ours is missing.
    """
    entry_points()
    for name in PACKAGES:
        spec = importlib.machinery.PathFinder.find_spec(name, PLACES)
        if spec is None or spec.loader is None or spec.origin is None:
            raise ImportError(f"no package {name} in {PLACES[-1]}: install perceiver-train again")
        if name in sys.modules:
            _check_origin(name, Path(spec.origin))
            continue
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


@cache
def entry_points() -> Any:  # of one class in Python 3.11, of another one later
    """Return the entry points of the installed packages, as the first call finds them."""
    return importlib.metadata.entry_points()


def _check_origin(name: str, ours: Path) -> None:
    """Raise an ImportError if the module that is imported under a name is not ours."""
    found = getattr(sys.modules[name], "__file__", None)
    if found is None or Path(found).resolve() != ours.resolve():
        where = found or next(iter(getattr(sys.modules[name], "__path__", [])), "an unknown place")
        raise ImportError(f"{name} is imported from {where}, wanted {ours}: rename the other one")


def main() -> None:
    """Run the command `perceiver`."""
    try:
        pin()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from perceiver.__main__ import main

    main()
