"""The code of a run: the version of this package, and the commit of the working tree that it comes from."""

import contextlib
import functools
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "perceiver-train"
GIT_S = 10.0
TAGS = {"version": "perceiver.version", "commit": "mlflow.source.git.commit", "dirty": "perceiver.git.dirty"}


@functools.cache
def code_facts() -> dict[str, str | bool]:
    """Return `version` of this package, and in a working tree of git its `commit` and whether it is `dirty`.

    The tree is that of the package if git tracks it, otherwise that of the current folder. It is dirty if a tracked
    file differs from the commit. The remote's URL, which may contain credentials, is not read.
    """
    facts: dict[str, str | bool] = {}
    with contextlib.suppress(PackageNotFoundError):  # a copy of the sources may not be installed
        facts["version"] = version(DISTRIBUTION)
    package = Path(__file__).resolve().parent
    folder = package if _git(package, "ls-files", "--error-unmatch", Path(__file__).name) else Path.cwd()
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    if commit and changed is not None:
        facts |= {"commit": commit, "dirty": bool(changed)}
    return facts


def code_tags() -> dict[str, str]:
    """Return `code_facts` as MLflow's tags."""
    return {TAGS[key]: value if isinstance(value, str) else str(value).lower() for key, value in code_facts().items()}


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None if it fails, is missing or does not answer in time."""
    # The tree may name a program as its monitor of changes.
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, check=True, env=environment)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
