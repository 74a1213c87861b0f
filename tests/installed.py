"""Packages with plug-ins, installed into a folder for a process that has it on its path."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

EXAMPLE = Path(__file__).with_name("example_plugin")
"""A package with the task `brier` and the hook `step_log`."""


def install(project: Path, site: Path) -> Path:
    """Copy the modules of a project and write its metadata, as pip does with a wheel; return the folder."""
    facts = tomllib.loads((project / "pyproject.toml").read_text())
    name, version = facts["project"]["name"], facts["project"]["version"]
    for package in facts["tool"]["setuptools"]["packages"]:
        shutil.copytree(project / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    groups = facts["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    write_metadata(site, name, version, "\n".join(lines))
    return site


def write_metadata(site: Path, name: str, version: str, entry_points: str) -> None:
    """Write the metadata of a distribution."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(entry_points)


def run_with(site: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with a folder on its path; return output and exit code."""
    command = [sys.executable, *words]
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
