"""Fixtures of the search tests."""

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.recipes import prepare_images
from tests.tune.searches import search_tree


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a prepared set of 80 + 40 images of 12 x 12."""
    return prepare_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def tree(tmp_path: Path, images: str) -> dict[str, Any]:
    """A small search's tree; its base recipe lies beside it."""
    return search_tree(tmp_path, images)
