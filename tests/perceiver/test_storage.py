"""Ranges of local files as views of the system's pages; URLs and targets that cannot be used; files written whole."""

import errno
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from perceiver import storage
from perceiver.config import UserError
from perceiver.export.weights import open_weights
from perceiver.storage import (
    MAPPED_BYTES,
    Bytes,
    ReadPolicy,
    open_folder,
    open_target,
    open_url,
    put_whole,
    read_range,
    refusing,
    unusable_file,
    write_whole,
)
from perceiver.tracking.redaction import redact_text
from perceiver.train.checkpoint.store import CheckpointStore

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


URLS = ("", "a\0b", "foo://x", "reference://x", "jlab://x", "generic://x", "http://[::1")


@pytest.mark.parametrize("url", [*URLS, "http://[::1]:80/x", "ftp://127.0.0.1:1/x", "blockcache://x", "zip://x"])
def test_a_url_that_cannot_be_opened_is_one_line(url: str) -> None:
    with pytest.raises(UserError, match="cannot open .*wanted a path, or a URL"):
        open_url(url)


def test_a_driver_s_reason_does_not_quote_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, **_: object) -> None:
        raise ValueError("no /repos/me/hunter2/git")

    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(UserError) as caught:
        open_url("github://me:hunter2@c")
    assert "hunter2" not in redact_text(str(caught.value))


@pytest.mark.parametrize(
    "url", ["tar://x::/etc/passwd", "zip://a::data.zip", "simplecache::s3://b/x", "filecache::file:///x", "a::b"]
)
def test_a_chain_of_urls_is_refused(url: str) -> None:
    for opened in (open_url, open_folder, open_target, open_weights, CheckpointStore):
        with pytest.raises(UserError, match="chained URLs .* not supported"):
            opened(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x", "https://127.0.0.1/x", "data:,x", "/dev/null", "file"])
def test_a_target_that_cannot_be_written_to_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="to write to"):
        open_target(url)
    assert open_target("new").local


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "link"])
def test_only_regular_files_are_replaced(kind: str, tmp_path: Path) -> None:
    target, source = tmp_path / "target", tmp_path / "source"
    source.write_text("new")
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    target = Path(os.devnull) if kind == "device" else target
    if kind == "link":
        target.symlink_to(os.devnull)
    for write in (
        lambda: write_whole(target, "new"),
        lambda: put_whole(source, open_folder(str(target.parent)), target.name),
    ):
        with pytest.raises(UserError, match="not a regular file"):
            write()
    assert not target.is_file() and not list(tmp_path.glob("*.partial"))


def test_a_file_is_replaced_and_its_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "new").write_text("new")
    for name in ("link", "dangling", "made/below"):
        put_whole(tmp_path / "new", open_folder(str(tmp_path)), name)
        assert (tmp_path / name).read_text() == "new"
    assert (tmp_path / "theirs").read_text() == "old" and not (tmp_path / "nowhere").exists()


def test_errors_of_a_store_are_one_line_but_a_full_disk_is_no_mistake() -> None:
    with pytest.raises(UserError, match=r"--to x .*no route\): choose"), refusing("--to x", "choose another"):
        raise RuntimeError("no route\ndetails")
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError) as caught, refusing("--to x", "choose another"):
        raise full
    assert caught.value is full and "no space left" in (unusable_file(full) or "")
    assert unusable_file(OSError(errno.EIO, "I/O error")) is None


def test_a_path_is_shown_whole_after_the_current_folder_was_deleted(tmp_path: Path, monkeypatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert storage.shortened(f"{here}/runs/a") == "runs/a" and storage.shortened("/x/y") == "/x/y"
    here.rmdir()
    assert storage.shortened(f"{here}/runs/a") == f"{here}/runs/a"
