"""Ranges of local files: views of the system's pages, and an error in place of a signal when a file is cut short."""

import mmap
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from perceiver import storage
from perceiver.storage import MAPPED_BYTES, Bytes, ReadPolicy, open_folder, read_range

CONTENT = bytes(range(256)) * (3 * MAPPED_BYTES // 256)
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems copy")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(CONTENT)
    return tmp_path / "data"


def read(path: Path, start: int, stop: int) -> Bytes:
    return read_range(open_folder(str(path.parent)), path.name, start, stop, ReadPolicy())


@linux
@pytest.mark.parametrize("start", [0, 1, mmap.ALLOCATIONGRANULARITY, MAPPED_BYTES + 5])
def test_a_large_range_is_a_view(path: Path, start: int) -> None:
    found = read(path, start, start + MAPPED_BYTES + 3)
    assert isinstance(found, memoryview) and found.readonly
    assert found == CONTENT[start : start + MAPPED_BYTES + 3]


def test_a_small_range_is_a_copy(path: Path) -> None:
    assert read(path, 5, MAPPED_BYTES) == CONTENT[5:MAPPED_BYTES]
    assert isinstance(read(path, 5, MAPPED_BYTES), bytes)


@linux
def test_views_keep_their_pages_and_few_files_are_kept_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MOST_MAPPED", 2)
    views = [read(path, 0, MAPPED_BYTES) for _ in range(4)]
    assert bytes in map(type, views) and memoryview in map(type, views)
    path.unlink()
    part = views[0][10:20]
    del views
    assert part == CONTENT[10:20]


def test_a_file_that_is_too_short_is_an_error(path: Path) -> None:
    with pytest.raises(OSError, match=rf"got {MAPPED_BYTES} of {2 * MAPPED_BYTES} bytes"):
        read(path, 2 * MAPPED_BYTES, 4 * MAPPED_BYTES)


@linux
def test_a_file_cut_short_after_it_was_mapped_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Access to such pages would terminate the process; the system is asked for them first."""

    class Late(mmap.mmap):
        def __new__(cls, *args: Any, **options: Any) -> "Late":
            pages = super().__new__(cls, *args, **options)
            os.truncate(path, 100)
            return pages

    monkeypatch.setattr(storage.mmap, "mmap", Late)
    with pytest.raises(OSError, match=rf"got 100 of {2 * MAPPED_BYTES} bytes"):
        read(path, 0, 2 * MAPPED_BYTES)
