"""Check the versions of Python and of libraries against the ranges of pyproject.toml, read from our metadata."""

import contextlib
import importlib.metadata
import platform
import shlex
from collections.abc import Collection

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from perceiver.config import UserError

DISTRIBUTION = "perceiver-train"
ENGINES = ("ray", "torch", "deepspeed", "mlflow")
"""The libraries that every command but `doctor` checks at its start."""


def check_versions() -> None:
    """Refuse an unsupported Python, and an unsupported or missing Ray, torch, DeepSpeed or MLflow.

    Reads only metadata and imports none of them. Does nothing where our package has no metadata, as in a job on a
    cluster whose image lacks it: the submitting machine has checked.

    Raises:
        UserError: one line with what was found, what is wanted, and the command that corrects it.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if python := unsupported_python():
            raise UserError(f"unsupported: {python}: install the package with such a Python in a separate environment")
        wrong, fix = unsupported_libraries(ENGINES)
        if wrong:
            raise UserError(f"unsupported: {'; '.join(wrong)}: {fix}")


def unsupported_python() -> str:
    """Return this Python's version and the range that our package requires; empty if it is within."""
    wanted = SpecifierSet(importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"])
    found = platform.python_version()
    return "" if wanted.contains(found, prereleases=True) else f"Python {found}, wanted {_text(wanted)}"


def unsupported_libraries(names: Collection[str] = ()) -> tuple[list[str], str]:
    """Compare installed libraries with the ranges that our package requires.

    Args:
        names: distributions, as in pyproject.toml; default: all that our package requires.

    Returns:
        One text for each that is missing or outside its range, and the pip command that corrects all of them.
    """
    wrong, fixes = [], []
    for need in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or []):
        if names and need.name not in names or need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found = installed_version(need.name)
        if not found or not need.specifier.contains(found, prereleases=True):
            wanted = _text(need.specifier)
            wrong.append(f"{need.name} {found or 'is missing'}, wanted {wanted}")
            extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
            fixes.append(shlex.quote(f"{need.name}{extras}{wanted}"))
    return wrong, f"pip install {' '.join(fixes)}" if fixes else ""


def installed_version(name: str) -> str:
    """Return the version of an installed distribution; empty if it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _text(specifier: SpecifierSet) -> str:
    """Return a range with its lower bound first."""
    return ",".join(sorted(map(str, specifier), reverse=True))
