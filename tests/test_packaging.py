"""Wheels contain every file that the program reads at run time."""

import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_package_data_names_every_file_that_is_no_module() -> None:
    """setuptools takes modules by itself and other files by these patterns; a pattern without a file is a mistake."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    listed = subprocess.run(
        ["git", "ls-files", *patterns, "recipes"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    named = [path for path in map(ROOT.joinpath, listed.stdout.splitlines()) if not path.is_symlink()]
    wanted = {str(path.relative_to(ROOT)) for path in named if path.suffix != ".py"}
    given = set()
    for package, globs in patterns.items():
        for glob in globs:
            # perceiver/recipes is a link
            found = {str(path.resolve().relative_to(ROOT)) for path in (ROOT / package).glob(glob)}
            assert found, f"{package}: {glob} matches no file"
            given |= found
    assert wanted == given & wanted and given - wanted == set()
