"""What a job takes along: our sources; the recipe, the files that it names, and a folder of the user's."""

import importlib.metadata
import importlib.util
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from pathspec import GitIgnoreSpec

import perceiver_train
from cluster.recipe.file import base_files, packaged
from perceiver.config import UserError
from perceiver.environment import DISTRIBUTION, installed_version, needed
from perceiver.train.engine.deepspeed_config import DeepSpeedConfig, read_config
from perceiver_train.extras import EXTRA

MOST_FOLDERS = 20_000
LIMIT_BYTES = 100 * 1024 * 1024
"""The dashboard's limit, which is also Ray's limit for a working directory."""

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
"""Names that are never uploaded: caches, environments, data, and the output of runs."""

BUILT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.pyd", "*.o")
"""Names that are not copied from our sources, whose folders may be called data or runs: caches, built libraries."""

SECRET_FOLDERS = (
    ".ssh",
    ".gnupg",
    ".aws",
    ".azure",
    ".kube",
    ".docker",
    ".config/gcloud",
    ".huggingface",
    ".cache/huggingface/token*",
    ".password-store",
)
SECRET_FILES = (
    *SECRET_FOLDERS,
    ".git",
    ".env",
    ".env.*",
    ".envrc",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.jks",
    "*.keystore",
    "*.kdb",
    "*.kdbx",
    "*.ppk",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    ".netrc",
    "_netrc",
    ".pypirc",
    ".npmrc",
    ".pgpass",
    ".my.cnf",
    ".git-credentials",
    ".vault-token",
    ".dockercfg",
    ".databrickscfg",
    ".s3cfg",
    ".boto",
    ".htpasswd",
    "kubeconfig",
    "*.kubeconfig",
    "credentials*.json",
    "client_secret*.json",
    "secrets.y*ml",
    "secrets.json",
    "secrets.toml",
    "auth_token",
)
"""Names of files and folders that may contain secrets, in any case; they are not uploaded."""


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of paths that have one of the names as a part."""
    parts = "|".join(re.escape(name).replace(r"\*", "[^/]*") for name in names)
    return re.compile(rf"(?:^|/)(?:{parts})(?:/|\Z)", re.IGNORECASE)


_SECRET_FOLDER, _SECRET_FILE = _pattern(SECRET_FOLDERS), _pattern(SECRET_FILES)


IGNORE_FILES = (".gitignore", ".rayignore")
"""Applied when a folder is copied, and not copied themselves: Ray would apply them to our sources, too."""


def build_package(
    target: Path, recipes: Iterable[str], folder: str | None = None, excludes: Sequence[str] = ()
) -> list[str]:
    """Copy the user's files that a job needs into a folder, the job's working directory.

    Args:
        target: an empty folder.
        recipes: the recipe and other files that it names; they keep their path below the current folder.
        folder: a folder of the user's that is uploaded too (``--working-dir``).
        excludes: patterns in .gitignore syntax of files in that folder that are not uploaded.

    Returns:
        Files of the folder that are not uploaded because they may contain secrets or are links that leave it.

    Raises:
        UserError: a file is missing or cannot be read, or the package exceeds the job server's limit.
    """
    secret: list[str] = []
    if folder is not None:
        root = Path(folder).resolve()
        files, secret = travelling(root, excludes)
        for file in files:
            place = target / file.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)
    for place, recipe in _places(recipes).items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe, target / place)
    check_size(target)
    return sorted(secret)


def copy_sources(target: Path) -> Path:
    """Copy our sources into a folder; return the package `perceiver_train` with the others in it, see its docstring.

    A separate upload (``py_modules``), so that files of the user's may have the names of our packages.
    """
    place = target / perceiver_train.__name__
    shutil.copytree(_source(perceiver_train.__name__), place, ignore=BUILT)
    for name in perceiver_train.PACKAGES:
        shutil.copytree(_source(name), place / name, ignore=BUILT)
    return place


def travelling(folder: Path, excludes: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
    """Return the files of a folder to upload, by the rules of ``ray job submit`` and ours.

    Returns:
        The files to upload, and the names of those left out: they or what they link to may contain secrets, or they are
        links that leave the folder.

    Raises:
        UserError: a file cannot be read, the folder is one of secrets, or the files exceed the job server's limit.
    """
    home = folder.resolve()
    if _SECRET_FOLDER.search(home.as_posix()):
        raise UserError(f"--working-dir {folder} may contain secrets, and would be uploaded: give another folder")
    ignore_files = IGNORE_FILES if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1" else (".rayignore",)
    kept: list[Path] = []
    secret: list[str] = []
    lost: list[Path] = []
    visits = itertools.count(1)

    def visit(place: Path, rules: tuple[tuple[Path, GitIgnoreSpec], ...], above: frozenset[Path]) -> None:
        if (real := place.resolve()) in above:
            return  # a link to a folder above
        if next(visits) > MOST_FOLDERS:
            raise ValueError(f"more than {MOST_FOLDERS:,} folders, those behind links included")
        for name in ignore_files:
            if (place / name).is_file():
                # Names of files that are not UTF-8 are read alike.
                lines = (place / name).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
                rules = (*rules, (place, GitIgnoreSpec.from_lines(lines)))
        for path in sorted(place.iterdir()):
            shown = "/" * path.is_dir()
            if any(spec.match_file(f"{path.relative_to(base)}{shown}") for base, spec in rules):
                continue
            if LEFT_OUT(str(place), [path.name]) or path.name in IGNORE_FILES:
                continue
            if may_be_secret(path, folder) or path.is_symlink() and path.exists() and _leads_astray(path, home):
                secret.append(str(path.relative_to(folder)))
            elif path.is_dir():
                visit(path, rules, above | {real})
            elif path.is_file() and os.access(path, os.R_OK):
                kept.append(path)
            else:
                lost.append(path)

    try:
        visit(folder, ((folder, GitIgnoreSpec.from_lines(excludes)),), frozenset())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--working-dir {folder} cannot be read ({error}): repair it or leave it out") from None
    if lost:
        what = "is a broken link" if lost[0].is_symlink() else "cannot be read"
        raise UserError(f"--working-dir: {lost[0]} {what}: remove it, or add it to {folder / '.rayignore'}")
    _check_sizes({str(path.relative_to(folder)): path.stat().st_size for path in kept}, LIMIT_BYTES)
    return kept, secret


def _leads_astray(link: Path, home: Path) -> bool:
    """Return whether a link leaves the folder, or leads to a file in it that may contain secrets."""
    real = link.resolve()
    return not real.is_relative_to(home) or may_be_secret(real, home)


def may_be_secret(path: Path, folder: Path) -> bool:
    """Return whether a file or folder, or one above it below `folder`, has the name of one that may contain secrets."""
    if _SECRET_FILE.search(path.relative_to(folder).as_posix()):
        return True
    return path.name.lower().startswith("id_") and not path.suffix and path.is_file()  # an SSH key of any name


def _places(recipes: Iterable[str]) -> dict[str, Path]:
    """Return each file by its path in the package.

    Raises:
        UserError: two files have the same path.
    """
    places: dict[str, Path] = {}
    for recipe in recipes:
        file = packaged(recipe).resolve()
        if places.setdefault(path_in_package(recipe), file) != file:
            raise UserError(
                f"{places[path_in_package(recipe)]} and {file} would have the same path in the package: submit from a "
                "folder that contains both"
            )
    return places


def path_in_package(recipe: str) -> str:
    """Return a file's path in the package: relative to the current folder, or its name alone if it is outside."""
    path = Path(recipe).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def check_size(folder: Path, limit: int = LIMIT_BYTES) -> int:
    """Return the size of a folder in bytes.

    Raises:
        UserError: it exceeds the limit; the message names the largest files.
    """
    files = (path for path in folder.rglob("*") if path.is_file())
    return _check_sizes({str(path.relative_to(folder)): path.stat().st_size for path in files}, limit)


def _check_sizes(sizes: Mapping[str, int], limit: int) -> int:
    total = sum(sizes.values())
    if total > limit:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        named = ", ".join(f"{path} ({sizes[path] / 2**20:.1f} MiB)" for path in largest)
        raise UserError(
            f"the package has {total / 2**20:.1f} MiB, the job server accepts {limit / 2**20:.0f} MiB; largest: "
            f"{named}: omit --working-dir, or add large files to its .rayignore"
        )
    return total


def locked_requirements() -> list[str]:
    """Return all requirements of our distribution except Ray, pinned to the versions that are installed here."""
    pinned: dict[str, str] = {}
    waiting = [DISTRIBUTION]
    while waiting:
        for requirement in _requirements(waiting.pop()):
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if name in pinned or name == "ray":
                continue
            version = importlib.metadata.version(name)
            # A local version such as 2.13.0+cpu is a build for this machine, not for the cluster.
            pinned[name] = f"{name}=={version.partition('+')[0]}"
            waiting.append(name)
    return sorted(pinned.values())


def _requirements(name: str) -> Iterator[Requirement]:
    """Yield the requirements of an installed distribution on this platform, and our optional ones if installed."""
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        extras = ("", EXTRA, "s3") if name == DISTRIBUTION else ("",)
        if needed(requirement, extras) and installed_version(requirement.name):
            yield requirement


def _source(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations, name
    return Path(next(iter(spec.submodule_search_locations)))


def recipe_files(recipe: str) -> list[str]:
    """Return a recipe's file and its bases.

    Raises:
        UserError: a base would not be where the recipe finds it in the package.
    """
    bases, place = base_files(recipe), packaged(recipe)
    for base in bases:
        written, target = os.path.relpath(base, place.parent), Path(base).resolve()
        if place.resolve().parent / written != target:
            raise UserError(f"{recipe}: its base {base} is a link to {target}: name that file, or copy it")
        if Path(path_in_package(base)) != Path(path_in_package(recipe)).parent / written:
            raise UserError(f"{recipe}: its base {base} is in another folder: submit from {place.resolve().parent}")
    return [recipe, *bases]


def named_files(tree: Mapping[str, Any]) -> list[str]:
    """Return the local files that a recipe names by relative path and reads when it starts: the DeepSpeed JSON.

    Only keys that are paths of such files count: another value may have the name of a file by chance, or on purpose. A
    file outside the current folder is none of them (`is_named_file`).

    Raises:
        UserError: the file is not a JSON object.
    """
    section = tree.get("deepspeed")
    file = section.get("config") if isinstance(section, Mapping) else None
    if not isinstance(file, str) or not is_named_file(file):
        return []
    read_config(DeepSpeedConfig(config=file))
    return [file]


def is_named_file(file: str) -> bool:
    """Return whether a text is the relative path of a file below the current folder, not of a link that leaves it."""
    path = Path(file)
    if path.is_absolute() or ".." in path.parts or "://" in file or not path.is_file():
        return False
    return path.resolve().is_relative_to(Path.cwd().resolve())
