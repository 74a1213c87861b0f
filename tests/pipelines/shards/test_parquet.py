"""Parquet files through pyarrow: row groups by range reads, local or remote, with the types that the features want."""

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perceiver.storage import Folder, ReadError, ReadPolicy, open_folder
from pipelines.shards import parquet
from pipelines.shards.parquet import read_footer, read_row_group

SCHEMA = pa.schema([("key", pa.string()), ("image", pa.binary()), ("label", pa.int64())])
COLUMNS = {"image": "image.bytes", "label": "label"}
POLICY = ReadPolicy(attempts=3, backoff=0)


def write(folder: Path) -> int:
    """Write a file of two row groups as hubs have them; return its size."""
    rng = np.random.default_rng(0)
    images = [{"bytes": rng.bytes(5000), "path": f"{n}.png"} for n in range(20)]
    labels = pa.array([n % 3 for n in range(20)], pa.int32())
    pq.write_table(pa.table({"other": ["x"] * 20, "image": images, "label": labels}), folder / "a.parquet", 12)
    return (folder / "a.parquet").stat().st_size


class Counted:
    """A remote file system: a folder's files by range, some of the requests failing."""

    def __init__(self, failures: int = 0) -> None:
        self.local, self.failures, self.requests = fsspec.filesystem("file"), failures, 0
        self.protocol = "counted"

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        self.requests += 1
        if self.failures:
            self.failures -= 1
            raise ConnectionResetError("injected")
        return self.local.cat_file(path, start=start, end=end)


def read(folder: Folder, size: int, group: int, groups: tuple[int, ...] = (12, 8)) -> pa.RecordBatch:
    return read_row_group(folder, "a.parquet", size, group, np.array(groups), SCHEMA, COLUMNS, (), POLICY)


def test_row_groups_are_read_with_few_requests_and_retries(tmp_path: Path) -> None:
    size = write(tmp_path)
    wanted = pq.read_table(tmp_path / "a.parquet").slice(12)
    for failures in (0, 2):
        store: Any = Counted(failures)
        found = read(Folder(store, str(tmp_path), "counted://x"), size, 1)
        assert found.equals(read(open_folder(str(tmp_path)), size, 1)) and found.schema == SCHEMA
        assert found["image"].to_pylist() == [row["bytes"] for row in wanted["image"].to_pylist()]
        assert found["label"].to_pylist() == wanted["label"].to_pylist()
        assert found["key"].to_pylist() == [f"a.parquet#1.{row}" for row in range(8)]
        assert store.requests == 2 + failures, "the footer and the columns, which lie together"
    with pytest.raises(ReadError, match=r"counted://x/a\.parquet .*3 attempts: ConnectionResetError"):
        read(Folder(Counted(99), str(tmp_path), "counted://x"), size, 1)  # type: ignore[arg-type]


def test_damage_is_an_error(tmp_path: Path) -> None:
    size = write(tmp_path)
    raw = (tmp_path / "a.parquet").read_bytes()
    for change in (raw[:-30], raw[: size // 2], bytes(size), b""):
        (tmp_path / "a.parquet").write_bytes(change)
        read_footer.cache_clear()
        with pytest.raises((OSError, pa.ArrowException)):
            read(open_folder(str(tmp_path)), size, 0)


def test_a_row_group_of_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write(tmp_path)
    monkeypatch.setattr(parquet, "MAX_BYTES", 10)
    with pytest.raises(OSError, match="a row group of .* bytes, wanted up to 10"):
        read(open_folder(str(tmp_path)), size, 0)


@pytest.mark.parametrize("groups", [(12,), (12, 7), (12, 8, 1), (8, 12), (20,)])
def test_other_row_groups_than_the_manifest_lists_are_an_error(tmp_path: Path, groups: tuple[int, ...]) -> None:
    size = write(tmp_path)
    with pytest.raises(OSError, match=f"20 rows in 2 row groups, wanted {sum(groups)} in {len(groups)}"):
        read(open_folder(str(tmp_path)), size, 0, groups)


@pytest.mark.parametrize(
    "column, error",
    [
        (pa.array([1.5] * 20), "column label is double, wanted int64"),
        (pa.array(["cat"] * 20), "column label is string, wanted int64"),
        (None, "no column label"),
    ],
)
def test_other_types_are_named(tmp_path: Path, column: pa.Array | None, error: str) -> None:
    write(tmp_path)
    table = pq.read_table(tmp_path / "a.parquet").drop_columns(["label"])
    pq.write_table(table if column is None else table.append_column("label", column), tmp_path / "a.parquet")
    read_footer.cache_clear()
    with pytest.raises((pa.ArrowTypeError, KeyError), match=error):
        read(open_folder(str(tmp_path)), (tmp_path / "a.parquet").stat().st_size, 0, (20,))
