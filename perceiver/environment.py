"""The environment that commands run in: versions of Python and libraries, locale, proxies.

Versions are checked against the ranges of pyproject.toml, read from our metadata.
"""

import contextlib
import importlib.metadata
import locale
import os
import platform
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import perceiver_train
from perceiver.config import UserError
from perceiver_train.extras import EXTRA

DISTRIBUTION = "perceiver-train"
ENGINES = ("ray", "torch", "deepspeed", "mlflow")
"""The libraries that every command but `doctor` checks at its start."""

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOOPBACK = "localhost,127.0.0.1,127.0.0.0/8,::1"


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


def check_names() -> str:
    """Return one line if another installed distribution has a package of one of our names; empty if none has.

    Raises:
        UserError: it is in the same folder as ours, so that the files of both are mixed.
    """
    home = Path(perceiver_train.__file__).resolve().parents[1]
    for folder, name, owner in _owners(Path(place) for place in sys.path if place.endswith("-packages")):
        if folder.resolve() == home:
            raise UserError(
                f"{owner} and {DISTRIBUTION} both own {name} in {folder}, so that their files are mixed: install "
                f"{DISTRIBUTION} in a separate environment"
            )
        return f"note: {owner} owns {name} in {folder}; this command uses {home / name}"
    return ""


def _owners(folders: Iterable[Path]) -> Iterator[tuple[Path, str, str]]:
    """Yield folder, name and distribution of each module there that has one of our names but is of somebody else."""
    for folder in folders:
        names = [name for name in perceiver_train.PACKAGES if _exists(folder, name)]
        for record in folder.glob("*.dist-info/RECORD") if names else ():
            owner = record.parent.name.partition("-")[0]
            files = b"\n" + record.read_bytes()
            for name in names if owner != DISTRIBUTION.replace("-", "_") else ():
                if any(f"\n{name}{end}".encode() in files for end in ("/", ".py,")):
                    yield folder, name, owner


def _exists(folder: Path, module: str) -> bool:
    return (folder / module).is_dir() or (folder / f"{module}.py").is_file()


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
        if names and need.name not in names or not needed(need, ("", EXTRA)):
            continue
        found = installed_version(need.name)
        if not found or not need.specifier.contains(found, prereleases=True):
            wanted = _text(need.specifier)
            wrong.append(f"{need.name} {found or 'is missing'}, wanted {wanted}")
            extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
            whole = not found and not needed(need, [""])  # the extra was not installed
            fixes.append(shlex.quote(f"{DISTRIBUTION}[{EXTRA}]" if whole else f"{need.name}{extras}{wanted}"))
    return wrong, f"pip install {' '.join(dict.fromkeys(fixes))}" if fixes else ""


def needed(need: Requirement, extras: Collection[str]) -> bool:
    """Return whether a requirement applies to this platform and Python, with any of the extras ("" is none)."""
    return need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)


def installed_version(name: str) -> str:
    """Return the version of an installed distribution; empty if it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _text(specifier: SpecifierSet) -> str:
    """Return a range with its lower bound first."""
    return ",".join(sorted(map(str, specifier), reverse=True))


def use_utf8() -> None:
    """Start again in Python's UTF-8 mode under a locale that cannot write every character, as Python 3.15 does."""
    if locale.getencoding().lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # for Ray's processes, too
        os.execv(sys.executable, sys.orig_argv)


def proxies() -> list[str]:
    """Return the names of the proxies that the environment sets, in lower case."""
    return sorted({name.lower() for name, value in os.environ.items() if value and name.lower() in PROXIES})


def bypass_proxies() -> None:
    """Send requests to this machine (MLflow, Ray's job server) past the proxies that the environment names."""
    if proxies():
        given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (given, LOOPBACK)))
