"""Fixtures of the launch tests."""

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.recipes import small_tree


@pytest.fixture
def tree(tmp_path: Path, images: str) -> dict[str, Any]:
    """A small recipe's tree on those images."""
    return small_tree(tmp_path, images)
