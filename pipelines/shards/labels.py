"""The samples of each class: one pass over the column of labels, kept in the cache folder of the machine.

Only this column is read: of a prepared shard a small range of each record batch, of an indexed Parquet file the pages
of the column. The cache is valid for the same content of the split, see `content_digest`, wherever it is.
"""

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from perceiver.config import UserError
from perceiver.storage import Folder, ReadPolicy, cache_folder, first_line, open_folder, write_whole
from pipelines.features import LabelFeature, LabelsFeature
from pipelines.order.balanced import ClassIndex
from pipelines.order.plan import I64
from pipelines.shards.manifest import Manifest, ShardInfo, arrow_schema, content_digest, split_url
from pipelines.shards.parquet import RangeFile, read_row_group

LABEL = "label"
"""The feature whose classes are balanced."""
THREADS = 8


def class_index(
    url: str, manifest: Manifest, split: str, options: Mapping[str, str] | None = None, policy: ReadPolicy | None = None
) -> ClassIndex:
    """Return the samples of each class of a split, from the cache folder or by a pass over its labels.

    Args:
        url: folder of the data set.
        manifest: of the data set, with a feature `label` of one or several classes per sample.
        split: name of the split.
        options: storage options.
        policy: time-out and retries of remote reads.

    Raises:
        UserError: there is no such feature, or a file cannot be read or differs from the manifest.
    """
    if not isinstance(manifest.features.get(LABEL), LabelFeature | LabelsFeature):
        raise UserError(
            f"data.order = balanced needs the feature '{LABEL}' (one or several classes per sample), but {url} has"
            f" {', '.join(manifest.features)}: remove data.order, or prepare the data with labels"
        )
    kept = cache_folder("classes", f"{_digest(manifest, split)}.npz")
    found = _kept(kept)
    if found is None:
        found = _measured(url, manifest, split, options or {}, policy or ReadPolicy())
        content = io.BytesIO()
        np.savez(content, members=found.members, first=found.first)
        with contextlib.suppress(OSError, UserError):  # Without it, the next process passes over the labels again.
            write_whole(kept, content.getvalue())
    return found


def _digest(manifest: Manifest, split: str) -> str:
    """Return a SHA-256 of the split's content; indexed files have no checksum: their places and versions count, too."""
    part = manifest.split(split)
    places = [(shard.name, shard.tag) for shard in part.shards] if part.columns else []
    content = [content_digest(manifest, [split]), split, places, part.columns]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _kept(file: Path) -> ClassIndex | None:
    """Return what a former pass has kept; None if there is none, or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return ClassIndex(arrays["members"], arrays["first"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _measured(url: str, manifest: Manifest, split: str, options: Mapping[str, str], policy: ReadPolicy) -> ClassIndex:
    """Pass over the labels of all shards, some at a time."""
    part = manifest.split(split)

    def read(shard: ShardInfo) -> tuple[I64, I64]:
        place, name = split_url(url, shard.name)
        folder = open_folder(place, options)
        try:
            if not part.columns:
                folder.existing(name)
            rows = [_pairs(column) for column in _columns(folder, name, shard, manifest, part.columns, policy)]
        except (OSError, KeyError, pa.ArrowException) as error:
            what = "missing" if isinstance(error, FileNotFoundError) else first_line(error)
            raise UserError(
                f"data.order = balanced reads the labels of {folder.url}/{name}: {what}; restore the file, or prepare"
                " the data again"
            ) from error
        sizes = [count for count, *_ in rows]
        if sum(sizes) != shard.rows:
            raise UserError(
                f"{folder.url}/{name} has {sum(sizes):,} rows, the manifest {shard.rows:,}: restore the file, or"
                " prepare the data again"
            )
        starts = np.cumsum([0, *sizes[:-1]])
        found = [(row + start, label) for start, (_, row, label) in zip(starts, rows, strict=True)]
        return np.concatenate([row for row, _ in found]), np.concatenate([label for _, label in found])

    with ThreadPoolExecutor(THREADS) as pool:
        shards = list(pool.map(read, part.shards))
    first = np.cumsum([0, *(shard.rows for shard in part.shards[:-1])])
    rows = np.concatenate([row + start for start, (row, _) in zip(first, shards, strict=True)])
    return ClassIndex.of(rows, np.concatenate([label for _, label in shards]), len(manifest.classes))


def _columns(
    folder: Folder, name: str, shard: ShardInfo, manifest: Manifest, columns: Mapping[str, str], policy: ReadPolicy
) -> list[pa.Array]:
    """Return the labels of each row group of a shard or an indexed file."""
    wanted = arrow_schema(manifest.features).field(LABEL)
    if not shard.batches:
        groups, schema = np.array(shard.group_sizes(), np.int64), pa.schema([wanted])

        def group(number: int) -> pa.Array:
            layout = number, groups, schema, columns, manifest.classes
            return read_row_group(folder, name, shard.bytes, *layout, policy, shard.tag).column(0)

        return [group(number) for number in range(groups.size)]
    stream = RangeFile(folder, name, shard.bytes, policy)
    with pa.ipc.open_file(stream) as file:
        number = file.schema.get_field_index(LABEL)
        if number < 0 or file.schema.field(number).type != wanted.type:
            raise KeyError(f"no column {LABEL} of the type {wanted.type}")
    options = pa.ipc.IpcReadOptions(included_fields=[number], use_threads=False)
    with pa.ipc.open_file(stream, options=options) as file:
        found = [file.get_batch(at).column(0) for at in range(file.num_record_batches)]
    for column in found:
        column.validate(full=True)
    return found


def _pairs(column: pa.Array) -> tuple[int, I64, I64]:
    """Return the rows of a column, and of each label its row and class; -1 where it is null."""
    if pa.types.is_list(column.type):
        sizes = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        rows, labels = np.repeat(np.arange(len(column)), sizes), column.flatten()
        return len(column), rows, labels.fill_null(-1).to_numpy(zero_copy_only=False)
    return len(column), np.arange(len(column)), column.fill_null(-1).to_numpy(zero_copy_only=False)
