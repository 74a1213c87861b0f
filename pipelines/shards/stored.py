"""The files of a split one at a time, in order: prepared shards or indexed files, as rows of the features' columns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards.io import Folder, open_folder
from pipelines.shards.listing import file_tag
from pipelines.shards.manifest import Manifest, ShardInfo, Split, arrow_schema
from pipelines.shards.reader import KEY, column_at, fit, indexed_keys, split_url, stored_columns


@dataclass(frozen=True)
class StoredFile:
    """One file of a split.

    Attributes:
        folder: where it lies.
        name: within the folder.
        shard: what the manifest says of it.
        split: what it belongs to.
        manifest: of the data set.
    """

    folder: Folder
    name: str
    shard: ShardInfo
    split: Split
    manifest: Manifest

    def tables(self, wanted: "set[int] | None" = None) -> Iterator[tuple[int, pa.Table]]:
        """Number of the first row and the rows of each row group; of those that hold a row of `wanted` if it is given.

        Raises:
            OSError, pyarrow.ArrowException, KeyError: the file cannot be read as the manifest describes it.
        """
        schema = arrow_schema(self.manifest.features)
        with self.folder.fs.open(self.folder.file(self.name), "rb") as stream, pq.ParquetFile(stream) as file:
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if wanted is None or not wanted.isdisjoint(range(first, first + rows)):
                    table = file.read_row_group(group, use_threads=False)
                    yield (
                        first,
                        pa.table(
                            stored_columns(
                                table, self.split.columns, schema, self.manifest.classes, f"{self.name}#{group}", rows
                            )
                        ),
                    )
                first += rows

    def row_keys(self) -> list[str]:
        """Where each of its rows came from."""
        with self.folder.fs.open(self.folder.file(self.name), "rb") as stream, pq.ParquetFile(stream) as file:
            if not self.split.columns:
                return file.read(columns=[KEY]).column(KEY).to_pylist()
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return [key for group, rows in enumerate(sizes) for key in indexed_keys(f"{self.name}#{group}", rows)]

    def fault(self) -> str:
        """What is wrong with the file's size, version, rows or columns; empty if nothing is."""
        shard = self.shard
        try:
            info = self.folder.fs.info(self.folder.file(self.name))
            if info["size"] != shard.bytes:
                return f"{info['size']} bytes, the manifest says {shard.bytes}"
            if shard.tag and file_tag(info) != shard.tag:
                return "changed since it was indexed"
            with self.folder.fs.open(self.folder.file(self.name), "rb") as stream, pq.ParquetFile(stream) as file:
                rows, schema = file.metadata.num_rows, file.schema_arrow
            if rows != shard.rows:
                return f"{rows} rows, the manifest says {shard.rows}"
            return self._misfit(schema)
        except FileNotFoundError:
            return "missing"
        except (pa.ArrowException, OSError, KeyError) as error:
            return (str(error.args[0] if error.args else error).splitlines() or ["unreadable"])[0]

    def _misfit(self, schema: pa.Schema) -> str:
        wanted = arrow_schema(self.manifest.features)
        if self.split.columns:
            for field in wanted:
                if field.name in self.split.columns:
                    fit(column_at(schema.empty_table(), self.split.columns[field.name]), field, self.manifest.classes)
        elif not schema.equals(wanted):
            return f"columns {schema.names}, wanted {wanted.names} with their types"
        return ""


def stored_files(
    url: str, manifest: Manifest, split: Split, options: Mapping[str, str] | None = None
) -> Iterator[StoredFile]:
    """The files of a split of the folder at `url`, in the order of the sample ids."""
    folders: dict[str, Any] = {}
    for shard in split.shards:
        place, name = split_url(url, shard.name)
        if place not in folders:
            folders[place] = open_folder(place, options)
        yield StoredFile(folders[place], name, shard, split, manifest)
