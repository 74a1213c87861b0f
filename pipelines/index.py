"""Index Parquet tables with one row per sample: train on the files in place; only a manifest is written.

The manifest contains the files' absolute URLs, row groups, sizes and versions (the store's ETag, or the modification
time), and the columns of the features. Nothing is copied or shuffled, and only the footers are checked: rows are
shuffled among a few row groups, and a row group is read as a whole. Files that change later are refused when a run
starts.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from perceiver.config import UserError, expand_home
from perceiver.storage import Folder, ReadPolicy, first_line, open_folder, open_target, safe_name
from perceiver.tracking.printable import safe_line
from perceiver.tracking.redaction import redact_text
from pipelines.fingerprints import RawFiles, check_unchanged
from pipelines.prepare import Note, PrepareConfig, Progress, completed, existing, fingerprint
from pipelines.shards.listing import file_tag, listed
from pipelines.shards.manifest import (
    MANIFEST,
    Manifest,
    ShardInfo,
    Split,
    arrow_schema,
    save_manifest,
    split_url,
)
from pipelines.shards.parquet import column_at, fit, read_footer
from pipelines.sources import Listing, load_source
from pipelines.statistics import with_statistics

SOURCE = "table"
THREADS = 16
HEAVY_BYTES = 64 << 20
CONVERTED = ("target", "labels", "split", "group", "series", "points")
"""Options of the source whose columns must be converted, or whose rows must be divided."""


def index(
    source_name: str,
    src: str | None,
    dst: str,
    config: PrepareConfig | None = None,
    *,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Manifest:
    """Write a manifest of Parquet files that stay in place.

    Args:
        source_name: `table`; other sources must be prepared.
        src: folder of the files, a path or fsspec URL; credentials from the environment.
        dst: folder for the manifest.
        config: `options` of the source, for columns and classes; `storage_options` of `dst`.
        progress: called after each file with the number of samples so far and the file's name.
        note: called with each of the listing's notes.

    Raises:
        UserError: another source, no files, files that differ in their columns, or `dst` contains another data set.
    """
    config = config or PrepareConfig()
    if source_name != SOURCE:
        raise UserError(
            f"--index reads Parquet files in place (perceiver prepare {SOURCE} SRC DST --index);"
            f" source {source_name} must be converted: remove --index"
        )
    if config.media.given:
        raise UserError(
            f"--{config.media.given[0]} stores media anew, --index leaves them in place: remove one of them"
        )
    folder = open_target(dst, config.storage_options)
    mark = fingerprint(f"index {source_name}", src, config)
    options = {**dict.fromkeys(CONVERTED, ""), **config.options, "held_out": "none"}

    source = load_source(source_name)

    def listed_source() -> Listing:
        return source.listing(src, seed=0, shard_rows=config.shard_rows, options=options)

    if folder.exists(MANIFEST):
        manifest = existing(dst, config, mark)
        check_unchanged(manifest.raw, dst, src, source, listed_source, note)
        return completed(manifest, dst, config)
    if config.options.get("held_out", "none") != "none":
        raise UserError("--index cannot hold out rows of a file: remove the option held_out, or convert the data")
    if named := [key for key in CONVERTED if config.options.get(key)]:
        raise UserError(f"--index cannot take the option {named[0]}: convert the data without --index")
    if "," in config.options.get("text", ""):
        raise UserError("--index cannot take the option text with several columns: convert the data without --index")
    listing = listed_source()
    if note:
        for line in listing.notes:
            note(line)
        for rejected in listing.rejected:
            note(f"left out: {safe_line(rejected.key)}: {rejected.reason}")
    assert src is not None, "the source refuses None"
    files: dict[str, dict[str, None]] = {}
    columns: Mapping[str, str] = {}
    for unit in listing.units:
        columns = unit.content["columns"]
        files.setdefault(unit.split, {}).update(dict.fromkeys(name for name, *_ in unit.content["places"]))
    splits = {split: _split(src, sorted(names), columns, listing, progress) for split, names in files.items()}
    manifest = Manifest(
        name=safe_line(listing.name),
        features=dict(listing.features),
        classes=listing.classes,
        splits=splits,
        licence=listing.licence,
        source=redact_text(listing.origin),
        fingerprint=mark,
        raw=RawFiles(listing.versions, src).digest(),
    )
    manifest = with_statistics(manifest, dst, config.storage_options, config.spectrogram)
    try:
        save_manifest(manifest, folder)
    except OSError as error:
        raise UserError(f"cannot write to {dst}: {first_line(error)}; give a writable folder") from error
    return manifest


def _split(
    src: str, names: Sequence[str], columns: Mapping[str, str], listing: Listing, progress: Progress | None
) -> Split:
    """Return one split; footers are read several at a time."""
    root = src.rstrip("/") if "://" in src else str(Path(expand_home(src)).resolve())
    folders: dict[str, list[str]] = {}
    for name in names:
        try:
            safe_name(name.replace(":", ""))
        except ValueError as error:
            raise UserError(f"{error}: rename the file, or convert the data without --index") from None
        parent, file = split_url("", f"{root}/{name}")
        folders.setdefault(parent, []).append(file)
    shards: list[ShardInfo] = []
    paths: dict[str, str] | None = None
    done = 0
    for parent, found in folders.items():
        folder = open_folder(parent)
        infos = listed(folder, found)
        with ThreadPoolExecutor(THREADS) as pool:
            work = pool.map(
                lambda name, folder=folder, infos=infos: _file(folder, name, infos[name], columns, listing), found
            )
            for shard, where in work:
                if shard is not None:
                    if where != (paths := paths or where):
                        raise UserError(
                            f"{shard.name} has its features in {where}, other files in {paths}: move it"
                            " away, or convert the data without --index"
                        )
                    shards.append(shard)
                    done += shard.rows
                    if progress:
                        progress(done, shard.name)
    if not shards or paths is None:
        raise UserError(f"{src} has no rows: nothing to index")
    return Split(shards=tuple(shards), columns=paths)


def _file(
    folder: Folder, name: str, info: Mapping[str, Any], columns: Mapping[str, str], listing: Listing
) -> tuple[ShardInfo | None, dict[str, str]]:
    """Return one file as a shard (None if it has no rows), and the columns of its features."""
    url = f"{folder.url}/{name}"
    size = int(info["size"])
    try:
        footer = read_footer(folder, name, size, ReadPolicy(), file_tag(info))
        empty = footer.schema.to_arrow_schema().empty_table()
        paths = {feature: _path(empty, column) for feature, column in columns.items()}
        for wanted in arrow_schema(listing.features):
            if wanted.name in paths:
                fit(column_at(empty, paths[wanted.name]), wanted, listing.classes)
    except (pa.ArrowException, KeyError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{url}: {reason}; move the file away, or convert the data without --index") from error
    sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    if not sum(sizes):
        return None, paths
    if 0 in sizes:
        raise UserError(f"{url} has a row group of 0 rows, which cannot be indexed: convert the data without --index")
    runs = group_runs(sizes)
    index = {"rows": sum(sizes), "rows_per_group": max(sizes), "groups": runs if len(runs) > 1 else ()}
    return ShardInfo.model_validate({"name": url, "bytes": size, "tag": file_tag(info), **index}), paths


def _path(empty: pa.Table, column: str) -> str:
    """Return the column, or the field `bytes` of a struct, as data hubs store images."""
    if column in empty.column_names and pa.types.is_struct(empty.schema.field(column).type):
        return f"{column}.bytes"
    return column


def group_runs(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return row group sizes as runs of (rows, rows of each group but the last), as few as possible."""
    runs: list[list[int]] = []
    open_run = False
    for size in sizes:
        if open_run and size <= runs[-1][1]:
            runs[-1][0] += size
            open_run = size == runs[-1][1]
        else:
            runs.append([size, size])
            open_run = True
    return tuple((rows, size) for rows, size in runs)


def group_bytes(manifest: Manifest) -> int:
    """Return the approximate bytes of the largest row group: reading one sample reads all of it."""
    return max(
        shard.bytes * shard.rows_per_group // shard.rows for split in manifest.splits.values() for shard in split.shards
    )
