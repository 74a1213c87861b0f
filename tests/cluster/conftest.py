"""Fixtures of the launch tests."""

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.recipes import small_tree


@pytest.fixture
def tree(tmp_path: Path, images: str) -> dict[str, Any]:
    """A small recipe's tree on those images."""
    return small_tree(tmp_path, images)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own: no token, no local cluster, nothing in the environment that names one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_JOB_HEADERS", "{}")
    return tmp_path
