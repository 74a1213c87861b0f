"""Folders of commands under test: homes that share only the compiled kernels, files with the names of our packages."""

import contextlib
from pathlib import Path

from perceiver.storage import cache_folder
from perceiver_train import PACKAGES

KERNELS = cache_folder("kernels")


def share_kernels(home: Path) -> Path:
    """Link this machine's compiled kernels into a home, so that they are compiled once per machine; return the home."""
    KERNELS.mkdir(parents=True, exist_ok=True, mode=0o700)
    place = home / ".cache" / "perceiver" / "kernels"
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        place.symlink_to(KERNELS)
    return home


def write_names(folder: Path, packages: bool) -> Path:
    """Write modules of all our names, as packages or as single files, that end a process which imports them."""
    for name in PACKAGES:
        file = folder / (f"{name}/__init__.py" if packages else f"{name}.py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise SystemExit('a file of the user was imported')\n")
    return folder
