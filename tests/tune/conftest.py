"""Fixtures of the search tests."""

from pathlib import Path
from typing import Any

import pytest

from tests.tune.searches import search_tree


@pytest.fixture
def tree(tmp_path: Path, images: str) -> dict[str, Any]:
    """Return a small search's tree; its base recipe is in the same folder."""
    return search_tree(tmp_path, images)
