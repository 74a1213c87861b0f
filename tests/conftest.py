"""Fixtures of more than one folder of tests."""

import pytest

LONG = ("test_docs.py", "test_jobs.py", "test_notebook.py", "test_runs.py", "test_tables.py")
"""Files whose only slow test takes a minute or more; xdist starts those with several tests first by itself."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that none of them runs alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URL of a prepared set of 80 + 40 images of 12 x 12."""
    from tests.cluster.recipes import prepare_images

    return prepare_images(tmp_path_factory.mktemp("images"))
