"""What a job takes along to the cluster: our source trees and the recipe, and nothing else."""

import fnmatch
import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from pathspec import GitIgnoreSpec

from perceiver.config import UserError
from perceiver.versions import DISTRIBUTION

OURS = ("perceiver", "pipelines", "cluster", "tune")
LIMIT_BYTES = 100 * 1024 * 1024
"""What the dashboard takes; Ray's own limit for a working directory is the same."""

LEFT_OUT = shutil.ignore_patterns(
    "__pycache__",
    "*.py[co]",
    ".git",
    ".hg",
    ".venv",
    "venv",
    "node_modules",
    ".*_cache",
    "*.egg-info",
    ".DS_Store",
    "data",
    "runs",
    "mlruns",
    "mlflow.db*",
)
"""Names that never travel: caches, environments, data, and what runs leave behind."""

SECRET_FILES = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    ".netrc",
    ".pypirc",
    ".npmrc",
    ".git-credentials",
    "auth_token",
    ".ssh",
    ".aws",
    ".azure",
    ".kube",
)
"""Names of files and folders that hold secrets as a rule; they stay here."""

IGNORE_FILES = (".gitignore", ".rayignore")
"""Heeded when a folder is copied, and not copied: Ray would hold what lies beside the folder against them, too."""


def build_package(
    target: Path, recipes: Iterable[str], folder: str | None = None, excludes: Sequence[str] = ()
) -> list[str]:
    """Fill a folder with what the job needs; it becomes the working directory of the job.

    Args:
        target: an empty folder.
        recipes: the recipe and other files that it names; they keep their path below the current folder.
        folder: a folder of the user's that travels too (``--working-dir``).
        excludes: patterns, as those of .gitignore, of what does not.

    Returns: what of the folder stays here because such files hold secrets.

    Raises:
        UserError: a file is not there or cannot be read, or the whole is larger than the job server takes.
    """
    secret: list[str] = []
    if folder is not None:
        root = Path(folder).resolve()
        files, secret = travelling(root, excludes)
        for file in files:
            place = target / file.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)
    for name in OURS:
        shutil.copytree(_source(name), target / name, dirs_exist_ok=True, ignore=_no_code_but_ours)
    for place, recipe in _places(recipes).items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe, target / place)
    check_size(target)
    return sorted(secret)


def travelling(folder: Path, excludes: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
    """Return the files of a folder that travel, by the rules of ``ray job submit`` and ours, and the secret ones.

    Raises:
        UserError: a file cannot be read, or they are larger than the job server takes.
    """
    ignore_files = IGNORE_FILES if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1" else (".rayignore",)
    kept: list[Path] = []
    secret: list[str] = []
    lost: list[Path] = []
    seen: set[Path] = set()

    def visit(place: Path, rules: tuple[tuple[Path, GitIgnoreSpec], ...]) -> None:
        if (real := place.resolve()) in seen:
            return  # a link to a folder above
        seen.add(real)
        for name in ignore_files:
            if (place / name).is_file():
                rules = (*rules, (place, GitIgnoreSpec.from_lines((place / name).read_text().splitlines())))
        for path in sorted(place.iterdir()):
            shown = "/" * path.is_dir()
            if any(spec.match_file(f"{path.relative_to(base)}{shown}") for base, spec in rules):
                continue
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in SECRET_FILES):
                secret.append(str(path.relative_to(folder)))
            elif LEFT_OUT(str(place), [path.name]) or path.name in IGNORE_FILES:
                continue
            elif path.is_dir():
                visit(path, rules)
            elif path.is_file() and os.access(path, os.R_OK):
                kept.append(path)
            else:
                lost.append(path)

    try:
        visit(folder, ((folder, GitIgnoreSpec.from_lines(excludes)),))
    except (OSError, ValueError) as error:
        raise UserError(f"--working-dir {folder} cannot be read ({error}): repair it or leave it out") from None
    if lost:
        what = "a link to nothing" if lost[0].is_symlink() else "no file that can be read"
        raise UserError(f"--working-dir: {lost[0]} is {what}: remove it, or name it in {folder / '.rayignore'}")
    _check_sizes({str(path.relative_to(folder)): path.stat().st_size for path in kept}, LIMIT_BYTES)
    return kept, secret


def _places(recipes: Iterable[str]) -> dict[str, Path]:
    """Return where each file lies in the package.

    Raises:
        UserError: two of them in the same place.
    """
    places: dict[str, Path] = {}
    for recipe in recipes:
        file = Path(recipe).resolve()
        if places.setdefault(path_in_package(recipe), file) != file:
            raise UserError(
                f"{places[path_in_package(recipe)]} and {file} would have one name in the package: submit from a "
                "folder that both lie below"
            )
    return places


def path_in_package(recipe: str) -> str:
    """Return where a recipe lies in the package: as below the current folder, else by its name alone."""
    path = Path(recipe).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def check_size(folder: Path, limit: int = LIMIT_BYTES) -> int:
    """Return the bytes of a folder.

    Raises:
        UserError: more than the limit; the line names the largest files.
    """
    files = (path for path in folder.rglob("*") if path.is_file())
    return _check_sizes({str(path.relative_to(folder)): path.stat().st_size for path in files}, limit)


def _check_sizes(sizes: Mapping[str, int], limit: int) -> int:
    total = sum(sizes.values())
    if total > limit:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        named = ", ".join(f"{path} ({sizes[path] / 2**20:.1f} MiB)" for path in largest)
        raise UserError(
            f"the package has {total / 2**20:.1f} MiB, the job server takes {limit / 2**20:.0f} MiB; largest: {named}: "
            "leave --working-dir out, name what is large in its .rayignore, or move it to where the cluster reads data"
        )
    return total


def locked_requirements() -> list[str]:
    """Return every distribution that ours needs, pinned to the version that is installed here; Ray is the cluster's."""
    pinned: dict[str, str] = {}
    waiting = [DISTRIBUTION]
    while waiting:
        for requirement in _requirements(waiting.pop()):
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if name in pinned or name == "ray":
                continue
            version = importlib.metadata.version(name)
            # A local version such as 2.13.0+cpu is a build for this machine, not for the cluster's.
            pinned[name] = f"{name}=={version.partition('+')[0]}"
            waiting.append(name)
    return sorted(pinned.values())


def _requirements(name: str) -> Iterator[Requirement]:
    """Yield what an installed distribution needs on this platform, optional parts only of ours that are installed."""
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if name == DISTRIBUTION and requirement.marker is not None:
            wanted = wanted or requirement.marker.evaluate({"extra": "s3"})
        if wanted and _installed(requirement.name):
            yield requirement


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _source(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations, name
    return Path(next(iter(spec.submodule_search_locations)))


def _no_code_but_ours(folder: str, names: list[str]) -> set[str]:
    """Leave out caches and built libraries; folders of ours may well be called data or runs."""
    return {name for name in names if name == "__pycache__" or name.endswith((".pyc", ".so", ".pyd", ".o"))}


def named_files(tree: Mapping[str, Any]) -> list[str]:
    """Return the files of this machine that a recipe names by relative path and reads when it starts."""
    texts = [value for value in _texts(tree) if value.endswith((".json", ".yaml", ".yml"))]
    return [text for text in texts if not Path(text).is_absolute() and "://" not in text and Path(text).is_file()]


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _texts(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield node
