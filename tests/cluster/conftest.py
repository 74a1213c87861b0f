"""Fixtures of the tests of `cluster`."""

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.recipes import small_tree


@pytest.fixture
def tree(tmp_path: Path, images: str) -> dict[str, Any]:
    """Return the tree of a small recipe on the images."""
    return small_tree(tmp_path, images)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty home folder; set an environment without a token or a cluster."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that values set by a test are removed again
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_JOB_HEADERS", "{}")
    return tmp_path
