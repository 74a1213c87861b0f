"""Wheels contain every file that the program reads at run time."""

import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_package_data_names_every_file_that_is_no_module() -> None:
    """setuptools takes modules by itself and other files by these patterns; a pattern without a file is a mistake."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {path for path in listed.stdout.splitlines() if not path.endswith(".py")}
    given = set()
    for package, globs in patterns.items():
        for glob in globs:
            found = {str(path.relative_to(ROOT)) for path in (ROOT / package).glob(glob)}
            assert found, f"{package}: {glob} matches no file"
            given |= found
    assert wanted == given & wanted and given - wanted == set()
