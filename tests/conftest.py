"""Fixtures of more than one folder of tests."""

import pytest


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URL of a prepared set of 80 + 40 images of 12 x 12."""
    from tests.cluster.recipes import prepare_images

    return prepare_images(tmp_path_factory.mktemp("images"))
